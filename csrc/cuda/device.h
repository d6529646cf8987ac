// The few words in which the kernels speak to the machine. Under nvcc they are the GPU's own; any
// other compiler gets the same names from tests/simt/simt.h, which runs the kernels on a CPU.
//
// All global memory is read and written through load(), store() and copy_async16(): on a GPU they
// are one instruction, on a CPU they are also checked and counted.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define DLB_DEVICE __device__ __forceinline__

// One object of the block, and the dynamic shared memory of the launch (16-byte aligned).
#define DLB_SHARED(type, name) __shared__ type name
#define DLB_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

enum class Cached { kNormal, kStream, kGlobal };  // kStream: not again; kGlobal: not from L1

template <Cached kHow = Cached::kNormal, class T>
DLB_DEVICE T load(const T* from) {
  if constexpr (kHow == Cached::kStream) return __ldcs(from);
  if constexpr (kHow == Cached::kGlobal) return __ldcg(from);
  return *from;
}

template <Cached kHow = Cached::kNormal, class T>
DLB_DEVICE void store(T* to, T value) {
  if constexpr (kHow == Cached::kStream) {
    __stcs(to, value);
  } else {
    *to = value;
  }
}

// 16 bytes from global to shared memory, there after copy_async_wait() of the same thread.
DLB_DEVICE void copy_async16(void* shared, const void* global) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
DLB_DEVICE void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// 16 bytes to shared memory as one store; nvcc makes four of an assignment.
DLB_DEVICE void store_shared16(void* shared, const uint4& raw) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(raw.x), "r"(raw.y),
               "r"(raw.z), "r"(raw.w)
               : "memory");
}

// 2^x: for float the special unit's, which flushes denormals (2 ulp).
DLB_DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DLB_DEVICE double exp2_of(double x) { return exp2(x); }

// a b, rounded, whatever comes after it: never one operation with an addition.
DLB_DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
DLB_DEVICE double product(double a, double b) { return __dmul_rn(a, b); }

// Two 16-bit floats in a word, the first in its low half.
DLB_DEVICE float2 half2_floats(uint32_t word) {
  return __half22float2(*reinterpret_cast<__half2*>(&word));
}
DLB_DEVICE uint32_t floats_half2(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
DLB_DEVICE uint32_t larger_half2(uint32_t a, uint32_t b) {
  const __half2 pair = __hmax2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&pair);
}
DLB_DEVICE uint32_t larger_bfloat2(uint32_t a, uint32_t b) {
  const __nv_bfloat162 pair =
      __hmax2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&pair);
}
DLB_DEVICE uint32_t floats_bfloat2(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Thread-block clusters. On GPUs without them (before sm_90) a block is a cluster of its own.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define DLB_CLUSTERS 1
DLB_DEVICE unsigned cluster_rank() { return __clusterRelativeBlockRank(); }
DLB_DEVICE unsigned cluster_size() { return __clusterSizeInBlocks(); }
// Arrive releases, wait acquires; every thread of the cluster does both, in turn.
DLB_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
DLB_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// The same object in the shared memory of another block of the cluster.
template <class T>
DLB_DEVICE T* cluster_peer(T* shared, unsigned rank) {
  return static_cast<T*>(__cluster_map_shared_rank(shared, rank));
}
#else
#define DLB_CLUSTERS 0
DLB_DEVICE unsigned cluster_rank() { return 0; }
DLB_DEVICE unsigned cluster_size() { return 1; }
DLB_DEVICE void cluster_arrive() {}
DLB_DEVICE void cluster_wait() {}
template <class T>
DLB_DEVICE T* cluster_peer(T* shared, unsigned) {
  return shared;
}
#endif

// ---- host ----

inline cudaLaunchConfig_t launch_config(unsigned grid, unsigned threads, size_t shared_bytes,
                                        unsigned cluster, cudaStream_t stream,
                                        cudaLaunchAttribute& size) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim.x = cluster;
  size.val.clusterDim.y = size.val.clusterDim.z = 1;
  config.attrs = &size;
  config.numAttrs = cluster > 1;
  return config;
}

// kernel<<<grid, threads, shared_bytes, stream>>>(args), in clusters of `cluster` blocks if not 1.
template <class Args>
cudaError_t launch_kernel(void (*kernel)(Args), unsigned grid, unsigned threads,
                          size_t shared_bytes, unsigned cluster, cudaStream_t stream,
                          const Args& args) {
  cudaLaunchAttribute size;
  const auto config = launch_config(grid, threads, shared_bytes, cluster, stream, size);
  return cudaLaunchKernelEx(&config, kernel, args);
}

// Lets a kernel have this much shared memory and clusters of more than 8 blocks; once a device.
template <class Args>
cudaError_t prepare_kernel(void (*kernel)(Args), int shared_bytes, bool large_clusters) {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess && large_clusters) {
    error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  return error;
}

// Whether the code that the device runs knows clusters: where a build has none for 9.0 or later,
// the driver translates the PTX of an older architecture, which does not.
template <class Args>
cudaError_t knows_clusters(void (*kernel)(Args), bool* knows) {
  cudaFuncAttributes code = {};
  const auto error = cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(kernel));
  *knows = code.ptxVersion >= 90;
  return error;
}

// How many such clusters the device can hold at once; 0: it cannot run them.
template <class Args>
cudaError_t max_clusters(void (*kernel)(Args), unsigned threads, size_t shared_bytes,
                         unsigned cluster, int* count) {
  cudaLaunchAttribute size;
  const auto config = launch_config(cluster, threads, shared_bytes, cluster, nullptr, size);
  return cudaOccupancyMaxActiveClusters(count, kernel, &config);
}

#else
#include "simt.h"
#endif
