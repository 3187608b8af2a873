"""What a method is made of: method, step, visual tokens, reduction, budget."""
