"""What a trainer does after the backward pass, for loops of a test's own."""


def constrained_step(model, optimizer, constraints):
    for constraint in reversed(constraints):
        constraint.after_backward(model)
    for constraint in constraints:
        constraint.before_step(model)
    optimizer.step()
    for constraint in constraints:
        constraint.after_step(model)
    optimizer.zero_grad()
