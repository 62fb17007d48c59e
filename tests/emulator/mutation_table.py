"""The mutations, the cases that look at each file, and what cannot be caught."""

from emulator.mutations import KERNELS, Mutation, barriers_and_waits

POLICIES = ("tf32", "tf32x3", "bfloat16", "float64")
DTYPES = ("double", "float", "bfloat16")


def each(*names: str) -> tuple[str, ...]:
    """The names of cases that come once a dtype."""
    return tuple(f"{name}_{dtype}" for name in names for dtype in DTYPES)


DIRECT = (*each("linear", "convolution", "strided_convolution"), "corrected", "rounded_to_tf32", "many_unreliable")

# Cases of mutation_cases.py, cheapest first; also the list of files whose barriers and waits are looked for.
CASES = {
    "direct_norm.cuh": DIRECT,
    "direct_copy.cuh": DIRECT,
    "gram_norm.cuh": (
        *each("gram_of_pointwise", "rank_one", "gram_of_convolution", "gram_chunk_by_chunk"),
        "gram_by_itself",
    ),
    "gram_product.cuh": (*each("gram_of_pointwise", "gram_of_convolution"), "gram_by_itself"),
    "gram_contraction.cuh": (*each("gram_of_linear"), "many_unreliable", "contraction_by_itself"),
    "depthwise_norm.cuh": each("depthwise"),
    "affine_norm.cuh": each("affine"),
    "embedding_norm.cuh": each("embedding"),
    "weighting.cuh": each("weighting"),
    "correction.cuh": each("correction"),
    "expanded_correction.cuh": each("expanded"),
    "weighted_gemm.cuh": each("gemm"),
    "clip_weights.cuh": ("clipping",),
    "sum_partials.cuh": ("many_tiles",),
    "rank_one.cuh": each("rank_one"),
    "reduce.cuh": each("depthwise", "rank_one"),
    "mma.cuh": tuple(f"policy_{name}_{rows}" for name in POLICIES for rows in ("k", "mn")),
}

# Cases that say nothing of what the bindings answer: a kernel by itself, and an oracle that rounds to TF32, which the
# operators of ATen in a kernel's place do not.
NOT_OF_BINDINGS = ("gram_by_itself", "contraction_by_itself", "rounded_to_tf32")
# Cases that go through the bindings, for files whose cases above do not.
OF_BINDINGS = {
    "mma.cuh": (*each("linear", "convolution", "gram_of_pointwise", "gram_of_convolution", "gemm"), "gemm_in_tf32")
}

# Barriers and waits that no test can miss, and why.
HARMLESS: dict[str, str] = {}

# file: (name, original, mutant[, occurrence]).
WRITTEN: dict[str, list[tuple]] = {
    "mma.cuh": [
        ("sums' rows", "return (lane >> 2) + 8 * (e >> 1);", "return (lane >> 2) + 8 * (e & 1);"),
        ("sums' columns", "return 2 * (lane & 3) + (e & 1);", "return 2 * (lane & 3) + (e >> 1);"),
        ("tf32: rows of a", "return (lane & 3) + 4 * j;", "return (lane & 3) + 4 * (1 - j);", 0),
        ("tf32: rows of b", "return (lane & 3) + 4 * j;", "return (lane & 3) + 4 * (1 - j);", 1),
        ("tf32x3: rows of a", "return (lane & 3) + 4 * j;", "return (lane & 3) + 4 * (1 - j);", 2),
        ("tf32x3: rows of b", "return (lane & 3) + 4 * j;", "return (lane & 3) + 4 * (1 - j);", 3),
        ("tf32: column of a", "return lane >> 2;", "return lane & 7;", 0),
        ("tf32: column of b", "return lane >> 2;", "return lane & 7;", 1),
        (
            "tf32: a's registers",
            "a.r[0] = to_tf32(base[at[0]]), a.r[1] = to_tf32(base[at[0] + 8]);",
            "a.r[1] = to_tf32(base[at[0]]), a.r[0] = to_tf32(base[at[0] + 8]);",
        ),
        (
            "tf32: b's registers",
            "b.r[0] = to_tf32(base[at[0]]), b.r[1] = to_tf32(base[at[1]]);",
            "b.r[1] = to_tf32(base[at[0]]), b.r[0] = to_tf32(base[at[1]]);",
        ),
        (
            "tf32: a's registers, rows of m",
            "a.r[0] = to_tf32(p[0]), a.r[1] = to_tf32(p[8 * pitch]), a.r[2] = to_tf32(p[4])",
            "a.r[0] = to_tf32(p[0]), a.r[2] = to_tf32(p[8 * pitch]), a.r[1] = to_tf32(p[4])",
        ),
        (
            "tf32: b's registers, rows of n",
            "b.r[0] = to_tf32(p[0]), b.r[1] = to_tf32(p[4]);",
            "b.r[1] = to_tf32(p[0]), b.r[0] = to_tf32(p[4]);",
        ),
        ("tf32x3: no low part", "low = to_tf32(v - __uint_as_float(high));", "low = 0;"),
        ("tf32x3: no low part of a", "mma_tf32(step, a.low, b.high);", ""),
        ("tf32x3: no low part of b", "mma_tf32(step, a.high, b.low);", ""),
        ("16 bits: rows of a", "return (lane & 7) + 8 * (lane >> 4);", "return (lane & 7) + 8 * ((lane >> 3) & 1);"),
        ("16 bits: rows of b", "return lane & 15;", "return lane & 7;"),
        ("16 bits: column of a", "return 8 * ((lane >> 3) & 1);", "return 8 * (lane >> 4);"),
        ("16 bits: a not transposed", "load_matrix_x4_trans(a.r, base + at[0]);", "load_matrix_x4(a.r, base + at[0]);"),
        ("16 bits: b not transposed", "load_matrix_x2_trans(b.r, base + at[0]);", "load_matrix_x2(b.r, base + at[0]);"),
        ("16 bits: rows of m", "(lane & 15) * pitch + 8 * (lane >> 4)", "(lane & 15) * pitch + 8 * ((lane >> 3) & 1)"),
        ("16 bits: rows of n", "(lane & 7) * pitch + 8 * ((lane >> 3) & 1)", "(lane & 7) * pitch"),
        ("double: rows of a", "return lane & 3;", "return lane >> 3;", 0),
        ("double: rows of b", "return lane & 3;", "return lane >> 3;", 1),
        ("double: sums' columns", "return 2 * (lane & 3) + e;", "return (lane & 3) + 4 * e;"),
        (
            "double: rows of m",
            "a.r = base[(lane >> 2) * pitch + (lane & 3)];",
            "a.r = base[(lane & 3) * pitch + (lane >> 2)];",
        ),
        (
            "double: rows of n",
            "b.r = base[(lane >> 2) * pitch + (lane & 3)];",
            "b.r = base[(lane & 3) * pitch + (lane >> 2)];",
        ),
    ],
    "reduce.cuh": [
        ("a lane counted twice", "v += shuffle_xor(v, mask);", "v += shuffle_xor(v, mask == 16 ? 8 : mask);"),
        ("a warp left out", "total += scratch[w];", "if (w > 0) total += scratch[w];"),
        ("warps in one place", "scratch[threadIdx.x / 32] = v;", "scratch[0] = v;"),
    ],
    "rank_one.cuh": [
        ("the last piece left out", "i < count / kPiece", "i < count / kPiece - 1"),
        ("the rest behind pieces left out", "first + threadIdx.x", "vectors ? count : threadIdx.x"),
        ("pieces counted again", "first = count / kPiece * kPiece;", "first = 0;"),
        ("no strides", "v[i * step]", "v[i]"),
        ("the factors' sums in one place", "scratch + kRankOneThreads / 32", "scratch"),
    ],
    "clip_weights.cuh": [
        ("the last layer left out", "l < p.layers", "l < p.layers - 1"),
        ("no factors", "(p.factors ? p.factors[l] : 1.0)", "1.0"),
        ("no root", "sqrt(total)", "total"),
        ("negative sums are rooted", "total < 0", "false"),
        ("a sum that is not finite has a weight", "!finite", "false"),
        ("weights above one", "norm <= p.alpha", "false"),
    ],
    "sum_partials.cuh": [("the last left out", "j < p.count", "j < p.count - 1")],
    "direct_norm.cuh": [
        ("no stride", "y * g.stride[1] * taps.halo_w + x * g.stride[2]", "y * taps.halo_w + x"),
        ("no dilation", "y * g.dilation[1] * taps.halo_w + x * g.dilation[2]", "y * taps.halo_w + x"),
        ("the stage of the step before", "step % kStages * at.x_stage", "(step + 1) % kStages * at.x_stage"),
        ("raw pieces of the step before", "step % (kStages - 1)", "(step + 1) % (kStages - 1)", 1),
        ("columns of the first step", "step == 0 || p.tile_w < g.out[2]", "step == 0"),
        ("rows of gy", "P::a_row(lane, j) * Tile::kPitchG", "P::b_row(lane, j) * Tile::kPitchG"),
        ("rows of x", "position_at[P::b_row(lane, j)]", "position_at[P::a_row(lane, j)]"),
        ("column of x", "P::b_column(lane) + warp_c", "P::a_column(lane) + warp_c"),
        ("column of gy", "P::a_column(lane) + warp_d", "P::b_column(lane) + warp_d"),
        ("no step but the first ones loaded", "if (more) load(step + kStages - 1);", ""),
        ("the next line, not the next rectangle", "o.x = 0, o.y += p.tile_h;", "o.x = 0, ++o.y;"),
        ("what is done counts as left", "!p.done[e]", "bool(p.done[e])"),
        ("every other example", "place.example + p.example_step", "place.example + 2 * p.example_step"),
        ("all examples in the first one's place", "int64_t(example) * tiles + number", "int64_t(number)"),
        ("rows of the other half", "d0 + warp_d + (Tile::kD + 1) / 2 * P::kM >= g.rows", "true"),
        ("channels of an idle warp", "c0 + warp_c >= g.channels", "c0 + warp_c + P::kN >= g.channels"),
        ("taps beyond the last", "if (!kAllTaps && tap >= count) break;", ""),
        ("taps of the first slice", "taps.z * g.kernel[1] * g.kernel[2] + taps.first", "taps.first"),
        (
            "no padding",
            "o.x * g.stride[2] + taps.x * g.dilation[2] - g.padding[2]",
            "o.x * g.stride[2] + taps.x * g.dilation[2]",
        ),
    ],
    "direct_copy.cuh": [
        ("rows without zero fill", "sign_of(entry[j]) | outside", "outside"),
        ("channels that are none", "sign_of(entry[j]) | outside", "sign_of(entry[j])"),
        ("lines without zero fill", "sign_of(*entry)", "0", 0),
        ("lines of few channels without zero fill", "sign_of(*entry)", "0", 1),
        ("elements without zero fill", "c + j * kStep < end ? sign : -1", "c + j * kStep < end ? 0 : -1"),
        ("elements of channels that are none", "c + j * kStep < end ? sign : -1", "sign"),
        ("small elements without zero fill", "sign < 0 ? 0 : end", "end"),
        ("no zeros for channels that are none", "raw[e] = E{};", ""),
        ("the table of the step before", "from + slot * staging.entries", "from + (slot ^ 1) * staging.entries", 1),
        ("one pixel too many", "unsigned(x) < unsigned(image_x)", "unsigned(x) <= unsigned(image_x)"),
        ("one row of pixels too few", "unsigned(y) < unsigned(image_y)", "unsigned(y) + 1 < unsigned(image_y)"),
        ("rows that are none", "e < all ? e / a_line << 16 | e % a_line : -1", "e / a_line << 16 | e % a_line"),
        (
            "the window one pixel short",
            "e < all ? e / a_line << 16 | e % a_line : -1",
            "e < all - 1 ? e / a_line << 16 | e % a_line : -1",
        ),
        ("pieces from the image's first column on", "x <= 0 ? 0 : x / kVector * kVector", "0"),
        ("columns outside of the image", "if (new_columns) clear_columns(rows, o.x);", ""),
        ("the last piece", "first < pieces", "first < pieces - kPieces"),
        ("one column too many", "unsigned(piece.column + j) < columns", "unsigned(piece.column + j) <= columns"),
        (
            "one column too many, 16 bits",
            "unsigned(piece.column + lane / 4) < columns",
            "unsigned(piece.column + lane / 4) <= columns",
        ),
        ("cut off instead of rounded", "v.at[j] = __uint_as_float(to_tf32(v.at[j]));", ""),
        ("rows cut off instead of rounded", "round(rows);", ""),
        (
            "the first vector of a row rounded only",
            "rows += threadIdx.x / kChunks * kPitch + threadIdx.x % kChunks * kVector;",
            "rows += threadIdx.x / kChunks * kPitch;",
        ),
    ],
    "gram_norm.cuh": [
        ("pairs counted once", "Sum(diagonal && t == s ? 1 : 2)", "Sum(1)"),
        ("below the diagonal too", "t >= rows || (diagonal && t > s)", "t >= rows"),
        ("one band for the other", "side.set_positions(p, band);", "side.set_positions(p, u);"),
        ("pixels outside", "return inside ? total : count;", "return total;"),
        ("no row of zeros", "gram()[rows * p.gram_pitch + n] = 0;", ""),
        ("no column of zeros", "gram()[m * p.gram_pitch + columns] = 0;", ""),
    ],
    "gram_product.cuh": [
        ("vectors without zero fill", "valid * int(sizeof(E))", "16"),
        ("elements without zero fill", "(at >= 0) & (c < left)", "(at >= 0)"),
        ("only the last turn", "to = now == 0 ? sum : to + sum;", "to = sum;"),
        ("one row too few", "m >= rows_u || n >= rows_v", "m >= rows_u - 1 || n >= rows_v"),
        ("only the first side's rows", "offset + side * tile_rows", "offset"),
    ],
    "gram_contraction.cuh": [
        ("the diagonal counted twice", "column == row ? 1 : 2", "2"),
        ("pairs counted once", "column == row ? 1 : 2", "1"),
        ("below the diagonal too", "column < row || column >= c.positions", "column >= c.positions"),
        ("beyond the last column", "column < row || column >= c.positions", "column < row"),
        ("the middle group twice", "row >= c.positions || (!in_above && above == below)", "row >= c.positions"),
        ("the last groups left out", "(groups + 1) / 2", "groups / 2"),
        ("one row of a group alone", "line % kPack", "0"),
        ("columns of the first group", "at + above", "at"),
        ("a pack left out", "at - 1", "at"),
        ("the first example alone", "i * matrix", "0", 0),
        ("Q of the first example", "i * matrix", "0", 1),
        ("no magnitude", "magnitude += fabs(term);", ""),
        ("a sum that cancels", "size > c.cancellation * sum", "false"),
    ],
    "weighted_gemm.cuh": [
        ("one stage", "(step - first_step) % 2 * Tile::kStageElements", "0", 0),
        ("no weights", "b.scale(static_cast<const Sum*>(g.weights), g.positions, step * Tile::kStep, g.rows);", ""),
        (
            "rows of b",
            "P::a_row(lane, j) * Tile::kPitch + P::a_column(lane)",
            "P::b_row(lane, j) * Tile::kPitch + P::a_column(lane)",
        ),
        (
            "rows of a",
            "P::b_row(lane, j) * Tile::kPitch + P::b_column(lane)",
            "P::a_row(lane, j) * Tile::kPitch + P::b_column(lane)",
        ),
        ("the last row", "o < g.d && c < g.p", "o < g.d - 1 && c < g.p"),
        ("the last split", "split < g.splits", "split < g.splits - 1"),
    ],
    "depthwise_norm.cuh": [
        ("one pixel too many", "unsigned(w) < unsigned(g.in[2])", "unsigned(w) <= unsigned(g.in[2])"),
        ("a warp left out", "w < Tile::kWarps", "w < Tile::kWarps - 1"),
        ("the last tap", "lane == j && j < count", "lane == j && j < count - 1"),
    ],
    "affine_norm.cuh": [
        ("a row left out", "r < rows", "r < rows - 1"),
        ("the last row", "own.end - c", "own.end - 1 - c"),
        ("the last access of a row", "k * step < left", "k * step + step < left"),
        ("beyond a row's end", "k * step < left", "true"),
        ("beyond the last position", "k * rows < left", "true"),
        ("one access of each row", "launched.along", "false", 3),
        ("parts that overlap", "begin + launched.in_part < size ? begin + launched.in_part : size", "size"),
        ("the first slab's channels", "slab + column", "0 + column"),
        ("one part left out", "part < p.parts_count", "part < p.parts_count - 1"),
        ("no squares of the shift", "scratch + which * (kThreads / 32)", "scratch"),
    ],
    "correction.cuh": [
        ("the first example alone", "i * launched.packs * kPack", "0"),
        ("the first stretch's channels", "first / launched.in_run", "int(threadIdx.x) / launched.in_run"),
        ("the last access", "there ? at : first", "first"),
        ("the next run's channels", "if (pack >= launched.in_run) pack -= launched.in_run, ++run;", ""),
        ("no step to the next runs", "run += launched.runs_a_step, pack += launched.packs_a_step;", ""),
        ("the last access not read", "at < launched.packs", "at < launched.packs - 1", 0),
        ("the first channels' statistics alone", "from + k", "from"),
        ("the scale not divided", "gain * share", "gain"),
        (
            "channels of the first example",
            "static_cast<const Sum*>(p.shift)[at]",
            "static_cast<const Sum*>(p.shift)[c]",
        ),
        ("one pixel too many", "unsigned(x) < unsigned(g.in[2])", "unsigned(x) <= unsigned(g.in[2])"),
        ("lines beyond the image", "unsigned(y) < unsigned(g.in[1])", "true"),
        ("no stride", "t % g.out[2] * g.stride[2]", "t % g.out[2]"),
        ("no padding", "tap % g.kernel[2] * g.dilation[2] - g.padding[2]", "tap % g.kernel[2] * g.dilation[2]"),
        ("the last position", "t < positions", "t < positions - 1"),
        ("positions of the first team alone", "int(threadIdx.x) % p.team", "int(threadIdx.x)"),
        ("a warp left out", "w < kCorrectionWarps", "w < kCorrectionWarps - 1"),
        (
            "the first 32 channels alone",
            "p.channels_last ? c : c * g.pixels()",
            "p.channels_last ? lane : c * g.pixels()",
        ),
    ],
    "expanded_correction.cuh": [
        ("the last row of the weights", "o <= p.d", "o < p.d"),
        ("the last tap", "k < p.length", "k < p.length - 1"),
        ("the mean's moment elsewhere", "o < p.d ? o : 2 * p.d", "o < p.d ? o : 2 * p.d - 1"),
        ("the other order of memory", "p.channels_last ? p.d : positions", "p.channels_last ? positions : p.d"),
        ("the last row", "row < outer", "row < outer - 1"),
        ("once instead of twice", "*norm - 2 * cross", "*norm - cross"),
        ("one product instead of two", "2 * shift[o] * moments[p.d + o]", "shift[o] * moments[p.d + o]"),
        ("no mean", "shift[o] * to_float(m)", "Sum(0)"),
    ],
    "embedding_norm.cuh": [
        ("no heads", "!(same && s < t)", "!(same && s <= t)"),
        ("every position a head", "links[h] & kNotHead", "false", 1),
        ("the padding counts", "p.padding_idx < 0 || mine != p.padding_idx", "true"),
        ("the last position", "begin + h < p.positions", "begin + h < p.positions - 1"),
        ("the first row of four", "is_head ? begin + h : begin", "begin"),
    ],
    "weighting.cuh": [
        ("a warp left out", "v < kWeightingWarps", "v < kWeightingWarps - 1"),
        ("the next example's weight", "at >= t.per_example", "at > t.per_example"),
        ("the last example", "i < n ? weight_of(i) : Sum(0)", "i < n - 1 ? weight_of(i) : Sum(0)"),
        ("one example for eight", "i < n ? i : first", "first"),
        ("no weights", "Sum(weights[i])", "Sum(1)"),
        ("one round alone", "first += kWeightingWarps * kSumAccesses", "first += n"),
    ],
}

MUTATIONS = [
    mutation
    for file in CASES
    for mutation in (
        *(Mutation(entry[0], file, *entry[1:]) for entry in WRITTEN.get(file, [])),
        *barriers_and_waits(KERNELS / file, HARMLESS),
    )
]
