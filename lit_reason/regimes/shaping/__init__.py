"""Token-level reward shaping, its weights tuned by Bayesian optimisation over inner runs."""
