"""What stands behind `./run_all.sh`: it lists, runs and refreshes the notebooks of notebooks/.

Open main.py first: it parses the command line and calls one function of commands.py. plan.py says
what a call is about: which notebooks, which of them have to run (run_log.py), and what would stand
in their way (preflight.py). kernels.py has the CPU's kernels compiled before, forked.py loads once
what all notebooks import, and execute.py hands a notebook to papermill. Only `lesslib.run` imports
from here. An import loads no torch and no papermill, so that `./run_all.sh --list` answers at once.

A notebook declares in its metadata, under "lesslib", what the runner has to know of it:

    needs         numbers of the notebooks whose results or kernels it reads: ["02", "03"]
    experiments   names of the results files that it computes: ["language_modeling", "multi_query"]
    text_models   roles (of `lesslib.profiles.roles`) of the models that it has read corpora
    task_models   roles of the models that it has answer tasks

All four are lists of words, [] for none. A notebook that names a model needs the profile's corpora,
on which kernels are trained; one that names a model of tasks needs the profile's tasks as well.
`--fresh` forgets the points of `experiments`. `--refresh` keeps the four fields, and writes two
beside them: `executed`, the sha256 of the code cells that gave the outputs, and `profile`.
"""
