// What this host can do, in one line of JSON: bytes read a second, and bfloat16 operations a second.
//
//     machine THREADS MEBIBYTES SECONDS
//
// Reading: each thread sums its own part of a buffer that no cache holds, front to back. Operations: each thread multiplies
// and adds registers, with enough independent sums to keep the units busy; AVX-512-BF16 dot products where the CPU has
// them, else float32 multiply-adds. Both are the best of several passes, for they are limits.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace {

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double together(int threads, const std::function<void(int)>& work) {
  std::vector<std::thread> team;
  const double begin = seconds();
  for (int t = 0; t < threads; t++) team.emplace_back(work, t);
  for (auto& thread : team) thread.join();
  return seconds() - begin;
}

volatile std::uint64_t sink;

double bytes_per_second(int threads, std::size_t bytes, double wanted) {
  const std::size_t words = bytes / sizeof(std::uint64_t), part = words / threads;
  std::unique_ptr<std::uint64_t[]> buffer(new std::uint64_t[words]);
  together(threads, [&](int t) { std::fill_n(buffer.get() + t * part, part, t); });
  double best = 0;
  for (const double end = seconds() + wanted; seconds() < end;) {
    const double took = together(threads, [&](int t) {
      const std::uint64_t* from = buffer.get() + t * part;
      std::uint64_t sums[8] = {};
      for (std::size_t i = 0; i + 64 <= part; i += 64) {
        for (int j = 0; j < 8; j++) _mm_prefetch(reinterpret_cast<const char*>(from + i + 8 * j + 256), _MM_HINT_T0);
        for (int j = 0; j < 64; j++) sums[j % 8] += from[i + j];
      }
      std::uint64_t sum = 0;
      for (auto each : sums) sum += each;
      sink = sum;
    });
    best = std::max(best, threads * part * sizeof(std::uint64_t) / took);
  }
  return best;
}

constexpr long STEPS = 4'000'000;
constexpr int SUMS = 12;  // independent, so that latency does not count; all loops over them unroll, so that they are registers

#if defined(__AVX512BF16__)
constexpr const char* KIND = "AVX-512-BF16 dot products";
constexpr double OPERATIONS = 64;  // an instruction: 32 products and 32 additions
using Vector = __m512;
Vector next(Vector sum) {
  const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3c00), b = (__m512bh)_mm512_set1_epi16(0x3c01);
  return _mm512_dpbf16_ps(sum, a, b);
}
#elif defined(__FMA__)
constexpr const char* KIND = "float32 multiply-adds";
constexpr double OPERATIONS = 16;
using Vector = __m256;
Vector next(Vector sum) { return _mm256_fmadd_ps(_mm256_set1_ps(0.5f), _mm256_set1_ps(0.25f), sum); }
#else
#error "this host's peak rate is not written yet"
#endif

void multiply_and_add() {
  Vector sums[SUMS];
#pragma GCC unroll 12
  for (int j = 0; j < SUMS; j++) sums[j] = Vector{};
  for (long i = 0; i < STEPS; i++) {
#pragma GCC unroll 12
    for (int j = 0; j < SUMS; j++) {
      sums[j] = next(sums[j]);
      asm volatile("" : "+v"(sums[j]));
    }
  }
  float total = 0;
#pragma GCC unroll 12
  for (int j = 0; j < SUMS; j++) total += sums[j][0];
  sink = static_cast<std::uint64_t>(total);
}

double operations_per_second(int threads, double wanted) {
  double best = 0;
  for (const double end = seconds() + wanted; seconds() < end;) {
    const double took = together(threads, [](int) { multiply_and_add(); });
    best = std::max(best, threads * OPERATIONS * SUMS * STEPS / took);
  }
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const int threads = std::atoi(argv[1]);
  const double wanted = std::atof(argv[3]) / 2;
  const double bytes = bytes_per_second(threads, static_cast<std::size_t>(std::atol(argv[2])) << 20, wanted);
  const double operations = operations_per_second(threads, wanted);
  std::printf("{\"bytes_per_second\": %.0f, \"operations_per_second\": %.0f, \"operations\": \"%s\"}\n", bytes, operations, KIND);
}
