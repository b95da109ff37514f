// Batches: checked, for the kernels follow their indices without looking, and laid out as a Step has them.
#include <algorithm>

#include "program.h"

namespace fgsnap {
namespace {

// The highest of the blocks that hold a sequence's keys, or -1: it is not as it should be.
int64_t highest_block(const Ragged& batch, int64_t s) {
    const int64_t first = batch.starts[s], stop = batch.starts[s + 1], length = batch.lengths[s];
    if (first < 0 || first >= stop || stop > batch.tokens || stop - first > length) return -1;
    const int64_t blocks = (length + batch.block_size - 1) / batch.block_size;
    if (blocks > batch.sizes[s]) return -1;
    for (int64_t t = first; t < stop; ++t)
        if (batch.positions[t] != length - stop + t) return -1;
    int32_t lowest = 0, highest = 0;
    for (int64_t i = 0; i < blocks; ++i) {
        lowest = std::min(lowest, batch.tables[s][i]);
        highest = std::max(highest, batch.tables[s][i]);
    }
    return lowest < 0 ? -1 : highest;
}

bool within(const int32_t* numbers, int64_t count, int64_t bound) {
    return std::all_of(numbers, numbers + count, [&](int32_t number) { return number >= 0 && number < bound; });
}

}  // namespace
}  // namespace fgsnap

using namespace fgsnap;

// The sequence that is not as it should be; `sequences`: the batch as a whole is not; -1: all is well.
extern "C" __attribute__((visibility("default"))) int64_t fgsnap_plan(Ragged* batch) {
    const int64_t count = batch->sequences, no_bound = int64_t(1) << 31;
    const bool divided = count > 0 && batch->starts[0] == 0 && batch->starts[count] == batch->tokens;
    if (!divided || batch->block_size <= 0 || !within(batch->ids, batch->tokens, no_bound) ||
        !within(batch->selected, batch->rows, batch->tokens))
        return count;
    batch->tile_count = 0;
    batch->highest_block = -1;
    for (int64_t s = 0; s < count; ++s) {
        const int64_t highest = highest_block(*batch, s), first = batch->starts[s], stop = batch->starts[s + 1];
        if (highest < 0) return s;
        batch->highest_block = std::max(batch->highest_block, highest);
        std::fill(batch->table_of + first, batch->table_of + stop, batch->tables[s]);
        for (int64_t t = first; t < stop; t += TILE) {
            int32_t* const tile = batch->tiles + 2 * batch->tile_count++;
            tile[0] = int32_t(t);
            tile[1] = int32_t(std::min(TILE, stop - t));
        }
    }
    return -1;
}
