"""What users call: check the arguments, pick the defaults, run the operator."""
