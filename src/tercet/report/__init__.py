"""Reports: a run, several runs, a search or an explanation, for people to look at."""
