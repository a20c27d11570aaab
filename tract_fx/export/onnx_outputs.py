def value_for_loss(model, loss):
    return None
