"""
The formats (bits, columns per scale) that a matrix can be stored in, their bytes, and the choice between them for a
given number of bytes.
"""


def common_group(widths):
    """The largest of 128, 64 and 32 that divides the columns of all matrices, else 0."""
    return next((group for group in (128, 64, 32) if all(K % group == 0 for K in widths)), 0)


def choose_form(K, bits, group_size, name):
    """(bits, columns per scale) of a matrix of K columns."""
    if bits == 8:
        return 8, K
    if K % 2:
        raise ValueError(f"{name} has {K} columns, and 4 bits need an even number: use int8")
    if group_size and K % group_size:
        raise ValueError(f"group_size={group_size} does not divide the {K} columns of {name}: choose another of 32, "
                         "64, 128, or 0 for the largest that does, else whole rows")
    return 4, group_size or next((group for group in (128, 64, 32) if K % group == 0), K)


def forms_for(K):
    """The (bits, columns per scale) that a matrix of K columns can have. 16 bits: it stays as it is, 32 in float32."""
    groups = [size for size in (128, 64, 32) if K % size == 0] or [K]
    return [(4, group) for group in groups if K % 2 == 0] + [(8, K), (16, K)]


def bytes_of(shape, form, symmetric=False):
    """Bytes of a rounded matrix in a file. Per group, 4 bits have a scale of 16 bits and, if not symmetric, a zero of
    4; 8 bits a scale of 32."""
    (N, K), (bits, group) = shape, form
    return N * K * bits / 8 + (4 if bits == 8 else 2 if symmetric else 2.5) * N * K / group


def choose_formats(errors, sizes, budget):
    """The form of each matrix, so that the sum of errors is small and the sum of sizes at most `budget`.

    errors, sizes: {name: {form: number}}. With a price for each byte (a Lagrange multiplier), every matrix chooses
    alone: the form with the least error + price * size. No other choice of the same total size has a smaller total
    error (Everett 1963). The right price is the lowest that keeps within the budget; bisection finds it.
    """
    def choice(price):
        return {name: min(found, key=lambda form: (found[form] + price * sizes[name][form], sizes[name][form]))
                for name, found in errors.items()}

    def total(chosen):
        return sum(sizes[name][form] for name, form in chosen.items())
    low, high = 0.0, 1e-12
    while total(choice(high)) > budget:
        low, high = high, high * 2
        if high > 1e30:
            least = sum(min(found.values()) for found in sizes.values())
            raise ValueError(f"{budget:,.0f} bytes are too few: the smallest formats need {least:,.0f}, "
                             f"{least / budget:.3f} times as many")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if total(choice(middle)) <= budget else (middle, high)
    return choice(high)
