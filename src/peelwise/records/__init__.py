"""What is written down, as plain data: results of audits, peels, comparisons and runs, and their files. No torch."""
