"""One engine for all experiments: what a run is, how it is trained, kept and compared.

`task` says what an experiment has to give: four functions. `loop` trains it, `runs`
keeps the folder of a run, `cells` computes many runs once each, whichever process asks
first; `tuning`, `statistics` and `tables` make comparisons of them, `report` draws.
Nothing here knows a data set, a model or an optimizer: those are in
`experiments.tasks`.
"""
