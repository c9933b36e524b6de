"""Generation, grading in the sandbox, and reports."""
