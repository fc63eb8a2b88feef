"""What an aggregator in Python needs: candidates, jobs, results, the fleet's state, and the copies among candidates.

`candidates` and `sketches` need the standard library alone; what speaks to RabbitMQ and Redis needs ops/python.txt.
"""
