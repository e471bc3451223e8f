"""`report.html`: one self-contained page, made from `results.json` and what else lies in the run directory."""
