"""Mesh, sharding rules, start and end of several processes, TPU topologies."""
