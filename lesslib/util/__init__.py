"""The ground floor: what every folder may use and what knows nothing of attention.

Import from the modules: `from lesslib.util.files import write_json`. `files`, `progress`, `paths`
and `command_line` need no torch, so that the runner answers at once; `hardware` and `ranks` do.
Open `files.py` first: its atomic writes are why an interrupted run resumes.
"""
