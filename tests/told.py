"""A progress that remembers what it was told in words."""

from kdcache.progress import Silent


class Told(Silent):
    """Messages and warnings, in order."""

    def __init__(self):
        self.messages, self.warnings = [], []

    def message(self, text):
        self.messages.append(text)

    def warning(self, text):
        self.warnings.append(text)
