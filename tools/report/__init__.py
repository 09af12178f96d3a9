"""The report of runs as one HTML file; `python tools/report.py` is the command.

`build.report_data(run_dirs, options)` reads the directories, `html.page(data)` makes the file.
"""
