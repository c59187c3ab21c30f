"""Chain-of-thought reinforcement of a distilled student: rewards, a sandbox for generated code, and the run."""
