"""What bertray is measured by, beside what a user could pick instead. Results are in RESULTS.md."""
