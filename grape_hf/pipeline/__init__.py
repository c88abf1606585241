"""Training over pipeline stages under the Trainer: a model's blocks, divided among processes.

A *stage* is a process that holds some consecutive blocks of the model, and nothing of the others. A batch is cut into
*micro-batches*; they run through the stages one behind the other. With backpropagation a stage waits for the gradient
from the stage above. With direct feedback it waits for the error alone, which travels up unchanged.

``places`` says which process is which stage, ``cuts`` which blocks go to which. ``look`` runs the whole model once, and
``split`` keeps one stage of it. ``schedules`` says who does what in which order, and ``stage`` does it.
``micro_batches`` cuts a batch and weighs the losses, and ``step`` runs it. ``feedback`` holds the B_l of a stage.
``trainer`` is what the Trainer has to do otherwise, with ``accelerator``, ``checkpoints``, ``failures``, ``refusals``.
"""
