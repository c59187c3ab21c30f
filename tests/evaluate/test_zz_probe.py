from kdcache.cache.reader import open_cache
from kdcache.evaluate.rescore import _score, cached_teacher, _companion, rescore
from kdcache.recipe import parse_recipe
from kdcache.teacher.capture import capture
import numpy as np
def test_p(values, models):
    values["teacher"] |= {"dtype": "bfloat16", "batch_tokens": 16}
    values["selection"] = {"method": "top_k", "k": 8}
    d = capture(parse_recipe(values)).directory
    c = open_cache(d); f = cached_teacher(c, str(models/"teacher"))
    for sh in range(4):
        content=c.shard(sh); L=content.lengths.tolist()
        r=_score(c.plan,f,content,0,list(range(len(L))))
        for i,(a,b) in enumerate(r):
            print(L[i], L[_companion(L,i)], float(np.abs(a.head-b.head).max()), float(np.abs(a.label-b.label).max()))
