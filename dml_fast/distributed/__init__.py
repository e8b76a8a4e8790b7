"""A cohort over several processes: rows of a mesh hold students, columns hold parts of a batch.

Students exchange detached logits and nothing else, so they can be in different processes for the
price of one all-gather per step. `launch` knows how the processes were started, `mesh` which rank
holds what, `connect` how the ranks meet. `world` and `exchange` are how they communicate, and
`failure` is what they do when one of them dies.
"""
