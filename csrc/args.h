// What Python hands to the compiled kernels: addresses and numbers, no torch type.
#pragma once
#include <cstdint>

enum DlbDtype : int32_t { DLB_FLOAT32, DLB_FLOAT64, DLB_BFLOAT16, DLB_FLOAT16 };

// python_args.h fills this struct; see LossArgs in dlb_fused/backends.py for what each tensor is.
// "real" is double for DLB_FLOAT64 logits, else float. A null address is an absent
// tensor.
struct DlbArgs {
  int64_t B, C, overlap, fresh;
  int64_t logits_stride, last_stride, dlogits_stride;  // of rows, in elements
  int64_t ignore_index;
  const void* logits;
  const int64_t* labels;
  const void* last_logits;
  const int64_t* teacher_rows;
  const int64_t* last_labels;
  const uint8_t* last_valid;
  const void* weight;        // real
  const void* temperatures;  // real; null: `temperature`
  const void* alphas;        // real; null: `alpha`
  const void* ce_count;      // real; null: counted here
  const void* kl_count;      // real; null: counted here
  const void* grad_scale;    // real
  void* loss;                // real; null: only the gradient is wanted
  void* parts;               // (4,) real
  void* dlogits;             // null: no gradient is wanted; may be `logits`
  void* next_logits;
  int64_t* next_labels;
  uint8_t* next_valid;
  int64_t* stats;
  const int64_t* labels_b;  // null: rows have one label
  const void* lams;         // real; null: `lam`
  double temperature, alpha, label_smoothing, lam;
  int32_t dtype, last_dtype;
  int32_t temperature_step, alpha_step;  // 1: one value a row; 0: one for all
  int32_t threads;
  int32_t lam_step;  // as temperature_step
  int32_t distill_ignored;
  int32_t unused;
};
