"""A cohort over several processes: rows of a mesh hold students, columns hold shards of the data.

Students exchange detached logits and nothing else, so they can be in different processes for one
all-gather a step. `launch` knows how the processes were started, `mesh` who holds what, `world` how
they talk, `failure` what happens when one of them dies, `replicas` and `shards` what a student is
that trains on several ranks at once.
"""
