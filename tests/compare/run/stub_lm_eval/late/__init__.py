"""Late imports: after some of them no process must be forked."""
