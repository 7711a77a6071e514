"""How the small models that the package carries were made: pretraining, and a Falcon grown out.

Nothing else in lesslib needs this folder; `python -m lesslib.pretrain --help` is its command. Open
`pretrain.py` first: the settings and the course of a run. `text.py` has the corpora and windows,
`loss.py` the loss, `run.py` the steps and checkpoints, `starts.py` and `grow.py` new models.
"""
