// Which kernel runs, and its sizes: the one table. What is no more than a guess until it has been
// measured on a GPU is marked so.
#pragma once
#include "batch.h"
#include "row.h"
#include "tile.h"

enum class Form { kTile, kRow };

struct Plan {
  Form form;
  Source source;     // kRow
  int lanes;         // kTile: threads of a row
  int threads;       // of a block
  int slots;         // kChip: vectors of a row a thread
  unsigned cluster;  // blocks of a row
  unsigned grid;
  size_t shared;  // bytes a block
};

struct Device {
  bool clusters;
  size_t shared;     // bytes a block may have
  unsigned cluster;  // the largest that it can run
};

// A row of up to 4 KiB shares its block with others: 8 rows and their teachers then take 64 KiB,
// so that three blocks fit a multiprocessor.
constexpr size_t kTileRowBytes = 4096;
// Columns a thread of a short row, at least: fewer, and the merge of the threads costs more than
// the columns (some 12 instructions a step).
constexpr int kTileColumns = 8;
// Vectors of a row a thread, at least: above this, a block gets all its threads.
constexpr int kRowVectors = 4;
constexpr int kFewThreads = 128;
// Shared memory of a block: three blocks a multiprocessor, one loading while the others compute.
// A guess.
constexpr size_t kChipBytes = 72 * 1024;
// Blocks times rows up to which each block counts the rows for itself: some 10 MB read from L2,
// about the time of the launch that this saves. A guess.
constexpr int64_t kCountWork = 1 << 20;
constexpr int kChunkRows = 1024;  // of a block of the count kernel, at least

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Plan tile_plan(const DlbArgs& a, size_t item) {
  int lanes = 1;
  while (lanes < 32 && lanes * kTileColumns < a.C) lanes *= 2;
  const int64_t height = kThreads / lanes;
  const size_t tile = divided_up(height * a.C * item, 16) * 16;
  return {Form::kTile,
          Source::kChip,
          lanes,
          kThreads,
          0,
          1,
          unsigned(divided_up(a.B, height)),
          tile * (a.overlap > 0 ? 2 : 1) +
              (a.labels_b != nullptr ? kThreads * sizeof(AtLabelB<double>) : 0)};
}

inline Plan row_plan(const DlbArgs& a, size_t item, Source source, unsigned cluster) {
  // At most one vector more where a row does not begin at a multiple of 16 bytes.
  const int64_t vectors = divided_up(a.C * item + 16 - item, 16);
  const bool few = vectors < kRowVectors * kThreads * int64_t(cluster);
  const int threads = few ? kFewThreads : kThreads;
  const int slots = int(divided_up(vectors, int64_t(threads) * cluster));
  const size_t shared = size_t(slots) * threads * 16 * (a.overlap > 0 ? 2 : 1);
  return {Form::kRow,
          source,
          0,
          threads,
          slots,
          cluster,
          unsigned(a.B * cluster),
          source == Source::kChip ? shared : 0};
}

// singly: rows begin at different places of their 16 bytes. global: this kernel has a form for rows
// that are read twice 16 bytes at a time; with smoothing and in fp64 it is left out, since they are
// rare and it would be a sixth of all the machine code.
inline Plan make_plan(const DlbArgs& a, size_t item, bool singly, bool global,
                      const Device& device) {
  if (a.last_logits != nullptr && a.last_dtype != a.dtype) {
    return row_plan(a, item, Source::kSingly, 1);
  }
  if (a.C * item <= kTileRowBytes) return tile_plan(a, item);
  if (singly) return row_plan(a, item, Source::kSingly, 1);
  for (unsigned cluster = 1; cluster <= device.cluster; cluster *= 2) {
    const Plan plan = row_plan(a, item, Source::kChip, cluster);
    if (plan.shared <= kChipBytes) return plan;
  }
  // One block a multiprocessor, which beats a second read; but a row of one block alone would wait
  // for its load with nothing to do meanwhile. Guesses.
  const Plan plan = row_plan(a, item, Source::kChip, device.cluster);
  if (plan.shared <= (device.cluster > 1 ? device.shared : device.shared / 2)) return plan;
  return row_plan(a, item, global ? Source::kGlobal : Source::kSingly, 1);
}
