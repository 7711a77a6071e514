"""Recorded results in, pictures and tables out; nothing in this folder computes a result.

`results` reads and describes the recorded JSON, `paper` holds the paper's own numbers. `charts` and
`tables` are what the figures and tables of all experiments are made of, in the `style` they share;
a figure that only one experiment draws lies in that experiment's file. `plots` gathers `style`,
`charts` and `tables` under one name: `from lesslib.reporting import plots`. Open `charts` first.
"""
