"""The whole experiment: plans, runner, results, tables, figures."""
