"""The parts of `bash bench/gpu.sh`: environment, build, tests, benchmarks and sanitizers within one time limit.

`settings` reads the environment variables, `parts` says what is run in which order and with how many seconds,
`supervise` runs one part under its limit, `__main__` runs them all and keeps the summary. `environment`, `wheels`,
`build` and `machine` are commands that parts run; `prebuild` is run beforehand on another machine. Nothing here
imports more than the standard library: it works before there is an environment.
"""
