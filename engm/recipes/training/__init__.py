"""Training one network: the run of a configuration, its batches, schedules, precision, figures and loggers."""
