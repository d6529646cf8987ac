// CUDA's words on a CPU: kernels that include this run with one fiber for each GPU thread, all on
// the calling thread. README.md says what that checks; simt.cpp does it.
//
// Only what touches the kernel's own data is inline: a sanitizer must see those accesses in the
// kernel's source, and nothing of the scheduler.
#pragma once
#include <math.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

// ---- The language ----

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

// Of the fiber that runs; the scheduler sets them at every switch.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

using std::max;
using std::min;

inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline double __longlong_as_double(long long bits) {
  double value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline long long __double_as_longlong(double value) {
  long long bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// ---- What simt.cpp does for the words below ----

namespace simt {

enum class Access { kLoad, kStore, kUpdate };
// Counts an access to global memory. False: it may not happen, and the launch will say why.
bool allowed(Access access, const void* at, size_t size, size_t alignment);

struct Copy {
  uint4* shared;
  const uint4* global;
};
void begin_copy(const Copy& copy);
bool end_copy(Copy& copy);  // the next one of this thread, false: none left

void* shared_object(const void* key, size_t size);
unsigned char* dynamic_shared();
void* peer(void* shared, unsigned rank);

uint64_t exchange(const char* what, unsigned mask, uint64_t value, unsigned lane);
unsigned lane();
void before_atomic(void* counter);

struct Launch {
  uint32_t grid, threads, shared_bytes, cluster;
};
int prepare(const void* kernel, int shared_bytes, bool large_clusters);
int max_clusters(const void* kernel, const Launch& launch, int& count);
int run(const void* kernel, const Launch& launch, const std::function<void()>& thread);

template <class T>
T exchanged(const char* what, unsigned mask, T value, unsigned lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = exchange(what, mask, bits, lane);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T, class Place>
T& shared_object(Place) {  // `Place`, a lambda's type, is another for every line of source
  static_assert(alignof(T) <= 16);
  static const char key = 0;
  return *static_cast<T*>(shared_object(&key, sizeof(T)));
}

}  // namespace simt

// ---- Threads of a block and of a warp ----

void __syncthreads();
void __syncwarp(unsigned mask = ~0u);
void __threadfence();

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return simt::exchanged("__shfl_sync", mask, value, unsigned(lane) & 31);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip) {
  return simt::exchanged("__shfl_xor_sync", mask, value, (simt::lane() ^ unsigned(flip)) & 31);
}

inline unsigned atomicInc(unsigned* counter, unsigned limit) {
  simt::before_atomic(counter);
  if (!simt::allowed(simt::Access::kUpdate, counter, sizeof(unsigned), alignof(unsigned))) {
    return ~0u;
  }
  unsigned old = __atomic_load_n(counter, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(counter, &old, old >= limit ? 0 : old + 1, true,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

// ---- The words of device.h ----

#define DLB_DEVICE inline
#define DLB_SHARED(type, name) type& name = simt::shared_object<type>([] {})
#define DLB_DYNAMIC_SHARED(name) unsigned char* const name = simt::dynamic_shared()
#define DLB_CLUSTERS 1

enum class Cached { kNormal, kStream, kGlobal };

template <Cached kHow = Cached::kNormal, class T>
T load(const T* from) {
  if (simt::allowed(simt::Access::kLoad, from, sizeof(T), alignof(T))) return *from;
  T nothing;
  memset(&nothing, 0xff, sizeof(T));
  return nothing;
}

template <Cached kHow = Cached::kNormal, class T>
void store(T* to, T value) {
  if (simt::allowed(simt::Access::kStore, to, sizeof(T), alignof(T))) *to = value;
}

// From here to the wait, nobody can know what the shared memory holds.
inline void copy_async16(void* shared, const void* global) {
  const simt::Copy copy{static_cast<uint4*>(shared), static_cast<const uint4*>(global)};
  simt::begin_copy(copy);
  *copy.shared = {~0u, ~0u, ~0u, ~0u};
}
inline void copy_async_wait() {
  for (simt::Copy copy; simt::end_copy(copy);) *copy.shared = *copy.global;
}

// No compiler may see a sum behind the product.
template <class R>
DLB_DEVICE R product(R a, R b) {
  volatile R rounded = a * b;
  return rounded;
}

inline void store_shared16(void* shared, const uint4& raw) { *static_cast<uint4*>(shared) = raw; }

float exp2_of(float x);
double exp2_of(double x);

float2 half2_floats(uint32_t word);
uint32_t floats_half2(float low, float high);
uint32_t floats_bfloat2(float low, float high);
inline uint32_t larger_half2(uint32_t a, uint32_t b) {
  const float2 x = half2_floats(a), y = half2_floats(b);
  return floats_half2(fmaxf(x.x, y.x), fmaxf(x.y, y.y));
}
inline uint32_t larger_bfloat2(uint32_t a, uint32_t b) {
  const auto low = [](uint32_t word) { return __uint_as_float(word << 16); };
  return floats_bfloat2(fmaxf(low(a), low(b)), fmaxf(low(a >> 16), low(b >> 16)));
}

unsigned cluster_rank();
unsigned cluster_size();
void cluster_arrive();
void cluster_wait();
template <class T>
T* cluster_peer(T* shared, unsigned rank) {
  return static_cast<T*>(simt::peer(shared, rank));
}

// ---- The host's side ----

using cudaError_t = int;  // 1000: `cudaGetErrorString` tells what the shim found
using cudaStream_t = struct CUstream_st*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

cudaError_t cudaGetLastError();

// Lets a kernel have more than 48 KiB of dynamic shared memory, and clusters of more than 8 blocks.
template <class Args>
cudaError_t prepare_kernel(void (*kernel)(Args), int shared_bytes, bool large_clusters) {
  return simt::prepare(reinterpret_cast<const void*>(kernel), shared_bytes, large_clusters);
}

template <class Args>
cudaError_t knows_clusters(void (*)(Args), bool* knows) {
  *knows = true;
  return cudaSuccess;
}

// How many clusters the device holds at once: 0 if none fits.
template <class Args>
cudaError_t max_clusters(void (*kernel)(Args), unsigned threads, size_t shared_bytes,
                         unsigned cluster, int* count) {
  const simt::Launch launch{cluster, threads, uint32_t(shared_bytes), cluster};
  return simt::max_clusters(reinterpret_cast<const void*>(kernel), launch, *count);
}

template <class Args>
cudaError_t launch_kernel(void (*kernel)(Args), unsigned grid, unsigned threads,
                          size_t shared_bytes, unsigned cluster, cudaStream_t, const Args& args) {
  const simt::Launch launch{grid, threads, uint32_t(shared_bytes), cluster};
  return simt::run(reinterpret_cast<const void*>(kernel), launch, [&] { kernel(args); });
}
