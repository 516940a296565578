"""Training the hypernetwork (Eq. 7).

    objective    the losses of the edited model, and their gradient in the network's parameters
    schedule     which records each step edits, and how many
    validation   edits of records that training has not seen, and the score
    writer       the files of a run, written while it goes on
    trainer      HORSETrainer: steps, validations, the best archive
    history      losses and validations, as training.csv
    logs         ready-made logs to watch a run: TensorBoard, trackio, Weights & Biases
    checkpoint   what a run saves, and what a resumed run reads again

This package imports ``editing`` and what stands above it.
"""
