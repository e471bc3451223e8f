"""`report.html`: one page without scripts or anything loaded."""
