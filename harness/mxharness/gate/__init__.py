"""A gate for a model on changed kernels, with known error rates: divergence from a reference, then perplexity.

statistics.py estimates, divergence.py measures predictions, verdict.py decides, sequence.py reads more windows while
the verdict is open, compared.py gets what they show from models, stored.py keeps a reference, references.py says
whether references hold, noise.py makes an honest candidate, defects.py spoils weights that the gate must fail,
simulate.py shows how often it errs, judged.py takes a checkpoint through all of it.
"""
