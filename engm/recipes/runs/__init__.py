"""Runs on disk: a folder that resumes, its evaluation, reports, comparisons and exports."""
