"""Edits: made, saved, chained, taken back, exported.

    solve       from captured keys and gradients to the tensors of an edit (Eq. 4, 6, 2)
    in_force    what edits under a new one write, and how it stays written
    sweeps      residuals gathered in several captures of an edit
    blocks      an edit in blocks: sums instead of rows, and files to go on from
    crowding    how keys crowd: a warning, and how long the steps of sweeps may be
    memory      what an edit takes beside the model, estimated before the work
    applied     the edits in a model: put on and taken back
    editor      HorseEditor: how an edit is made
    delta       EditDelta: one edit as an object that can be saved, loaded and applied
    budget      the smallest ridge term that keeps drift within a budget
    archive     the trained hypernetwork on disk, and what it was made for
    chain       Chain: edits in one folder, made one on top of the other
    standing    whether the figures of an edit in a chain still hold, and new ones
    conflicts   what will go wrong with a list of edits, found before any weight moves
    checked     checked_edit: conflicts, figures before and after, one edit
    settings    a YAML to begin with for any model, and facts to begin with
    export      an edit as a PEFT LoRA adapter
    sharing     archives, edits, chains and adapters on the hub, with cards

This package imports ``evaluation`` and what stands above it.
"""
