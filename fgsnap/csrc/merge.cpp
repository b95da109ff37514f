// Byte pair encoding's merge loop over a table that lies ready in a file: no hash map has to be built before the first
// word is encoded. The order of merges is that of the `tokenizers` library: the lowest rank first, of equal ranks the
// leftmost; the algorithm is Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (2016).
#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

namespace {

// All pairs of tokens that merge, sorted by left and then right token. That the columns are as long as the counts say
// was checked when the file was read; whatever else they hold, no row outside them is looked at.
struct Pairs {
  int64_t tokens, rows;
  const uint32_t *starts, *rights, *ranks, *merged;

  explicit Pairs(const uint32_t* file) : tokens(file[0]), rows(file[1]) {
    starts = file + 4 + tokens;
    rights = starts + tokens + 1;
    ranks = rights + rows;
    merged = ranks + rows;
  }

  // The row of a pair, or -1.
  int64_t find(uint32_t left, uint32_t right) const {
    if (left >= tokens) return -1;
    const int64_t begin = std::min<int64_t>(starts[left], rows), end = std::min<int64_t>(starts[left + 1], rows);
    if (begin >= end) return -1;
    const uint32_t* found = std::lower_bound(rights + begin, rights + end, right);
    return found != rights + end && *found == right ? found - rights : -1;
  }
};

struct Symbol {
  uint32_t token;
  int64_t before, after;  // its neighbours in the word, or -1
  bool gone;              // into the symbol before it
};

struct Candidate {
  uint32_t rank, merged;
  int64_t at;  // the left symbol
  // std heaps keep the largest on top.
  bool operator<(const Candidate& other) const { return rank != other.rank ? rank > other.rank : at > other.at; }
};

class Merger {
 public:
  explicit Merger(const Pairs& pairs) : pairs_(pairs) {}

  // Merge the word that `tokens` begins with; returns how many tokens are left of it.
  int64_t merge(uint32_t* tokens, int64_t count) {
    if (count < 2) return count;
    spell(tokens, count);
    while (!candidates_.empty()) {
      std::pop_heap(candidates_.begin(), candidates_.end());
      const Candidate best = candidates_.back();
      candidates_.pop_back();
      if (still_there(best)) apply(best);
    }
    int64_t left = 0;
    for (int64_t at = 0; at >= 0; at = symbols_[at].after) tokens[left++] = symbols_[at].token;
    return left;
  }

 private:
  void spell(const uint32_t* tokens, int64_t count) {
    symbols_.clear();
    candidates_.clear();
    for (int64_t at = 0; at < count; ++at) symbols_.push_back({tokens[at], at - 1, at + 1 < count ? at + 1 : -1, false});
    for (int64_t at = 0; at + 1 < count; ++at) offer(at);
  }

  void offer(int64_t at) {
    const int64_t row = pairs_.find(symbols_[at].token, symbols_[symbols_[at].after].token);
    if (row < 0) return;
    candidates_.push_back({pairs_.ranks[row], pairs_.merged[row], at});
    std::push_heap(candidates_.begin(), candidates_.end());
  }

  // Whether the pair was not changed by a merge since it was offered.
  bool still_there(const Candidate& candidate) const {
    const Symbol& left = symbols_[candidate.at];
    if (left.gone || left.after < 0) return false;
    const int64_t row = pairs_.find(left.token, symbols_[left.after].token);
    return row >= 0 && pairs_.merged[row] == candidate.merged;
  }

  void apply(const Candidate& candidate) {
    Symbol& left = symbols_[candidate.at];
    Symbol& right = symbols_[left.after];
    left.token = candidate.merged;
    left.after = right.after;
    right.gone = true;
    if (left.after >= 0) symbols_[left.after].before = candidate.at;
    if (left.before >= 0) offer(left.before);
    if (left.after >= 0) offer(candidate.at);
  }

  const Pairs& pairs_;
  std::vector<Symbol> symbols_;
  std::vector<Candidate> candidates_;
};

}  // namespace

#if defined(__GNUC__)
#define EXPORT extern "C" __attribute__((visibility("default")))
#else
#define EXPORT extern "C"
#endif

// Merge every run of `tokens` that has one number in `words`, in place. Returns how many tokens are left, or -1 when
// there is not the memory for it. `file` is a tokenizer.tables as fgsnap/tokenizer.py tells of it; the 1 counts changes
// of this interface.
EXPORT int64_t fgsnap_merge_words_1(const uint32_t* file, uint32_t* tokens, const uint32_t* words, int64_t count) {
  const Pairs pairs(file);
  try {
    Merger merger(pairs);
    int64_t left = 0;
    for (int64_t begin = 0, end; begin < count; begin = end) {
      for (end = begin + 1; end < count && words[end] == words[begin];) ++end;
      const int64_t merged_to = merger.merge(tokens + begin, end - begin);
      std::copy(tokens + begin, tokens + begin + merged_to, tokens + left);
      left += merged_to;
    }
    return left;
  } catch (const std::bad_alloc&) {
    return -1;
  }
}
