// Sums of the rows of a matrix, and their sum, in one launch: a cluster of blocks for each row. It
// uses every word of the shim once; tests/test_simt.py takes them away one by one.
#include "simt.h"

struct RowSumsArgs {
  const float* matrix;  // (rows, columns), rows begin at multiples of 16 bytes
  float* sums;          // (rows,)
  float* total;         // (1,)
  unsigned* counter;    // 0 between launches
  int64_t columns, step;
  unsigned rows, threads, cluster, unused;
};

DLB_DEVICE float warp_sum(float x) {
  for (int mask = 16; mask; mask /= 2) x += __shfl_xor_sync(~0u, x, mask);
  return x;
}

DLB_DEVICE float block_sum(float x, float* parts) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();  // parts are written
  x = threadIdx.x < blockDim.x / 32 ? parts[threadIdx.x] : 0;
  return warp_sum(x);  // right in the first warp
}

__global__ void __launch_bounds__(1024) row_sums_kernel(const __grid_constant__ RowSumsArgs args) {
  DLB_DYNAMIC_SHARED(buffer);
  DLB_SHARED(float, block_part);
  DLB_SHARED(bool, is_last);
  float* tile = reinterpret_cast<float*>(buffer);  // 4 floats a thread
  float* parts = tile + 4 * blockDim.x;            // one a warp
  const unsigned rank = cluster_rank(), size = cluster_size();
  const unsigned row = blockIdx.x / size;
  const float* from = args.matrix + row * args.step;

  float x = 0;
  float* mine = tile + 4 * threadIdx.x;
  for (int64_t i = 4 * (rank * blockDim.x + threadIdx.x); i < args.columns;
       i += 4 * size * blockDim.x) {
    copy_async16(mine, from + i);
    copy_async_wait();  // mine is there
    for (int j = 0; j < 4; ++j) x += i + j < args.columns ? mine[j] : 0;
  }
  x = block_sum(x, parts);
  if (threadIdx.x == 0) block_part = x;
  cluster_arrive(), cluster_wait();  // all blocks have theirs
  if (rank == 0 && threadIdx.x == 0) {
    float sum = 0;
    for (unsigned r = 0; r < size; ++r) sum += *cluster_peer(&block_part, r);
    store(args.sums + row, sum);
  }
  cluster_arrive(), cluster_wait();  // no block ends while it is read
  if (rank != 0) return;

  if (threadIdx.x == 0) {
    __threadfence();  // the sum is there before it counts
    is_last = atomicInc(args.counter, args.rows - 1) == args.rows - 1;
    __threadfence();  // and it counts before others are read
  }
  __syncthreads();  // is_last is written
  if (!is_last) return;
  x = 0;
  for (unsigned r = threadIdx.x; r < args.rows; r += blockDim.x) {
    x += load<Cached::kGlobal>(args.sums + r);
  }
  x = block_sum(x, parts);
  if (threadIdx.x == 0) store(args.total, x);
}

extern "C" __attribute__((visibility("default"))) int row_sums(const RowSumsArgs* args) {
  if (const cudaError_t error = prepare_kernel(row_sums_kernel, 64 << 10, true)) return error;
  const size_t shared_bytes = args->threads * 16 + args->threads / 32 * 4;
  return launch_kernel(row_sums_kernel, args->rows * args->cluster, args->threads, shared_bytes,
                       args->cluster, nullptr, *args);
}
