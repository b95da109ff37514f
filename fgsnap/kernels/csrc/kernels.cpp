// The arithmetic of every op, compiled once for each instruction set (FGSNAP_VARIANT names it).
//
// An output element is always summed in the same order, whatever else is in the batch and however many threads there
// are. So a chunked prompt gives the bits of a whole one, and a batch the bits of its members alone; and a packed
// matrix gives the bits of a row-major one.
//
// No standard library templates here: an AVX-512 copy of one could be linked into the portable path.
#include "experts.h"
#include "scan.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)
#define SCAN(type) {peak<type>, masses<type>, weigh<type>, above<type>}

namespace fgsnap {

extern const Kernels JOIN(kernels_, FGSNAP_VARIANT) = {
    TEXT(FGSNAP_VARIANT), HAS_DOTS, embed, norm,   squares, add,   linear, select,    rope,        append,
    attend,               activate, gate,  latent, rotate,  route, assign, expert_up, expert_down,
    SCAN(float),          SCAN(double),
};

}  // namespace fgsnap
