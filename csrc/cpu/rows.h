// Between the entry point (loss.cpp) and the row kernels (rows.cpp, compiled once per instruction
// set).
#pragma once
#include <cstddef>
#include <cstdint>

#include "../args.h"

constexpr int64_t kDlbBlock = 2048;  // elements of a row that are worked on at a time
constexpr int kDlbBatch = 8;         // rows of few classes that are worked on together
constexpr int kDlbNarrowBatch = 16;  // the same for at most kDlbNarrow classes
constexpr int64_t kDlbNarrow = 128;
constexpr int64_t kDlbShortElements = 2048;  // of a batch of short rows, in each of its buffers

struct DlbJob {
  const DlbArgs* args;
  double weight_sum;  // of all classes; C without weight
  double ce_inverse;  // 1 / ce_count, 0 for a count of 0
  double kl_inverse;
  double grad_scale;
  bool teach;           // false: no row is taught
  bool stream;          // write outputs past the caches
  double* row_ce;       // (B,) ce_i of (2)
  double* row_kl;       // (overlap,) kl_i of (3), 0 where not taught
  double* row_distill;  // (overlap,) alpha tau^2 kl_i
};

inline double dlb_real(const DlbArgs& a, const void* p, int64_t i) {
  return a.dtype == DLB_FLOAT64 ? static_cast<const double*>(p)[i]
                                : static_cast<const float*>(p)[i];
}

inline bool dlb_row_valid(const DlbArgs& a, int64_t i) {
  return a.labels[i] != a.ignore_index && (!a.labels_b || a.labels_b[i] != a.ignore_index);
}

// Whether an overlap row with a teacher learns from it.
inline bool dlb_row_learns(const DlbArgs& a, int64_t i) {
  return a.distill_ignored || dlb_row_valid(a, i);
}

// The row of last_logits that may teach row i < overlap, or -1.
inline int64_t dlb_teacher_row(const DlbArgs& a, int64_t i) {
  const int64_t t = a.teacher_rows ? a.teacher_rows[i] : i;
  return t >= 0 && (!a.last_valid || a.last_valid[t]) ? t : -1;
}

// Bytes of working memory for one row at a time, enough for vectors of 64 bytes.
inline size_t dlb_row_scratch_bytes(const DlbArgs& a) {
  const int64_t real = a.dtype == DLB_FLOAT64 ? 8 : 4;
  const int64_t row = a.dlogits ? a.C : kDlbBlock;
  const int64_t blocks = 2 * (kDlbBlock * real + 64), rows = 3 * (row * real + 192);
  return size_t(blocks + rows + (a.C / kDlbBlock + 1) * 24 + 63) / 64 * 64;
}

// What one thread needs: that, two batches of short rows (at most one block long), and a vector
// that may be read past the last of them.
inline size_t dlb_scratch_bytes(const DlbArgs& a) {
  if (a.C > kDlbBlock) return dlb_row_scratch_bytes(a);
  const int64_t real = a.dtype == DLB_FLOAT64 ? 8 : 4;
  return dlb_row_scratch_bytes(a) + size_t(2 * 3 * kDlbShortElements * real) + 64;
}

// Rows [begin, end) of the job. `scratch` is aligned to 64 bytes.
using DlbRows = void (*)(const DlbJob& job, int64_t begin, int64_t end, char* scratch);
void dlb_rows_baseline(const DlbJob& job, int64_t begin, int64_t end, char* scratch);
void dlb_rows_v3(const DlbJob& job, int64_t begin, int64_t end, char* scratch);
void dlb_rows_v4(const DlbJob& job, int64_t begin, int64_t end, char* scratch);
