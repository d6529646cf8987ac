// What Python hands to the CUDA kernels, and the functions that launch them.
#pragma once
#include "../args.h"

constexpr int kDlbChunks = 256;  // blocks, and rows of results, of the count kernel

// dlb_fused/cuda_backend.py packs this struct. All addresses are of device memory.
struct DlbCudaArgs {
  DlbArgs loss;       // in backward: ce_count and kl_count are those that forward used
  const void* dloss;  // real; null: forward. Nothing is done where it equals grad_scale
  double grad_scale;  // unless loss.grad_scale is given
  int32_t* parity;    // of CachePair; then last_* and next_* are its two slots; else null
  int64_t slot_rows;  // rows of a slot
  void* sums;         // workspace: (3, B) real
  void* chunks;       // workspace: (3, kDlbChunks) real
  uint32_t* counter;  // workspace: blocks that have finished, 0 between launches
  uint64_t stream;
  int32_t device;
  int32_t always;  // backward: dlogits holds nothing yet, whatever dloss is
};

// Each returns 0 or a cudaError_t. One launch, with a small one before it for large batches.
extern "C" int dlb_cuda_loss(const DlbCudaArgs* args);
// dlogits *= dloss / grad_scale, in one launch.
extern "C" int dlb_cuda_rescale(const DlbCudaArgs* args);

extern "C" int dlb_cuda_runtime_version();
extern "C" int dlb_cuda_driver_version();          // 0: there is no driver
extern "C" int dlb_cuda_capability(int device);    // 90 for sm_90; -cudaError_t
extern "C" const char* dlb_cuda_error(int error);  // in words
