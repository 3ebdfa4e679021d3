"""Python twins of llm.c's utility headers: file formats, loaders, sampling, schedules, logs. Knows no kernels."""
