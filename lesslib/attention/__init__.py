"""Policy x state: attention over a bounded cache, merged as partial softmaxes.

layer.py is one layer while decoding, cache.py the cache of a whole model, whole_sequence.py the
same over a sequence at once; prompt.py takes several tokens, fit.py checks and weighs. Open
layer.py first. May import from states, policies, ops and util; transformers only by its cache
classes.
"""
