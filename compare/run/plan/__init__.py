"""Plans the run: specs to jobs, jobs to tasks by key, and which job writes or reads a reference."""
