// Launches the kernels of one element type; included by one source file for each.
#pragma once
#include "plan.h"

template <class T>
bool aligned(const void* address, int64_t step) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0 && step * sizeof(T) % 16 == 0;
}

// Where do the rows of a matrix begin, relative to those of logits?
template <class T>
bool alike(const DlbArgs& a, const void* address, int64_t stride, int64_t offset) {
  const uintptr_t z = reinterpret_cast<uintptr_t>(a.logits), other = uintptr_t(address);
  const int64_t steps = (stride - a.logits_stride) | offset;
  return address == nullptr || ((z - other) % 16 == 0 && steps * sizeof(T) % 16 == 0);
}

// Whether vectors of 16 bytes are cut alike from the rows of logits, dlogits and last_logits. Row i
// meets row i of last_logits, or any other one.
template <class T>
bool cut_alike(const DlbCudaArgs& given) {
  const DlbArgs& a = given.loss;
  const int64_t any = a.teacher_rows != nullptr ? a.last_stride : 0;
  return alike<T>(a, a.dlogits, a.dlogits_stride, 0) &&
         alike<T>(a, a.last_logits, a.last_stride, any | given.slot_rows * a.C);
}

template <class T>
KernelArgs kernel_args(const DlbCudaArgs& given, const Plan& plan) {
  const DlbArgs& a = given.loss;
  KernelArgs k = {given, false, 0, plan.lanes, plan.slots, false, false, false};
  const int64_t slots = given.slot_rows * a.C;
  k.flat = a.logits_stride == a.C && aligned<T>(a.logits, 0) &&
           (a.dlogits == nullptr || (a.dlogits_stride == a.C && aligned<T>(a.dlogits, 0)));
  k.flat_last =
      a.last_stride == a.C && a.teacher_rows == nullptr && aligned<T>(a.last_logits, slots);
  // Row i meets row i - (B - fresh) of next_logits.
  k.next_alike = alike<T>(a, a.next_logits, a.C, slots | (a.B - a.fresh) * a.C);
  const bool taught = a.overlap > 0, guarded = a.last_labels != nullptr || a.stats != nullptr;
  k.count = given.dloss == nullptr &&
            (a.ce_count == nullptr || (taught && (a.kl_count == nullptr || guarded)));
  if (k.count && plan.grid * a.B > kCountWork) {
    const int64_t chunks = divided_up(a.B, kChunkRows);
    k.chunks = chunks < kDlbChunks ? int(chunks) : kDlbChunks;
  }
  return k;
}

// What a kernel can have on a device, asked once for each kernel.
template <auto kKernel>
cudaError_t device_of(int index, Device& device) {
  struct Known {
    Device device;
    bool asked;
  };
  constexpr int kDevices = 64;
  static Known known[kDevices];
  if (index < kDevices && known[index].asked) {
    device = known[index].device;
    return cudaSuccess;
  }
  int major = 0, shared = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  }
  // The block's own objects lie in it too.
  shared -= 4096;
  bool clusters = false;
  if (error == cudaSuccess && major >= 9) error = knows_clusters(kKernel, &clusters);
  device = {clusters, size_t(shared), 1};
  if (error == cudaSuccess) error = prepare_kernel(kKernel, shared, clusters);
  for (unsigned cluster = 2; error == cudaSuccess && clusters && cluster <= kMaxCluster;
       cluster *= 2) {
    int count = 0;
    // More than 8 blocks are not for every device; a refusal is no error of ours.
    if (max_clusters(kKernel, kThreads, kChipBytes, cluster, &count) != cudaSuccess) {
      cudaGetLastError();
      break;
    }
    if (count == 0) break;
    device.cluster = cluster;
  }
  // The longest rows ask for more memory than that, which so many blocks together may not have.
  int count = 0;
  if (error == cudaSuccess && device.cluster > 1 &&
      (max_clusters(kKernel, kThreads, device.shared, device.cluster, &count) != cudaSuccess ||
       count == 0)) {
    cudaGetLastError();
    device.shared = kChipBytes;
  }
  if (error == cudaSuccess && index < kDevices) known[index] = {device, true};
  return error;
}

template <class T, bool kSmooth>
cudaError_t launch_rows(const DlbCudaArgs& given) {
  const DlbArgs& a = given.loss;
  constexpr auto chip = row_kernel<T, Source::kChip, kSmooth>;
  constexpr auto tile = tile_kernel<T, kSmooth>;
  Device device;
  cudaError_t error = device_of<tile>(given.device, device);
  if (error == cudaSuccess) error = device_of<chip>(given.device, device);
  if (error != cudaSuccess) return error;
  const Plan plan = make_plan(a, sizeof(T), !cut_alike<T>(given), !kSmooth, device);
  const KernelArgs k = kernel_args<T>(given, plan);
  const auto stream = reinterpret_cast<cudaStream_t>(given.stream);
  if (k.chunks > 0) {
    error = launch_kernel(count_kernel<Real<T>>, k.chunks, kThreads, 0, 1, stream, k);
    if (error != cudaSuccess) return error;
  }
  auto kernel = row_kernel<T, Source::kSingly, true>;
  if (plan.form == Form::kTile) kernel = tile;
  if (plan.form == Form::kRow && plan.source == Source::kChip) kernel = chip;
  if constexpr (!kSmooth) {
    if (plan.source == Source::kGlobal) kernel = row_kernel<T, Source::kGlobal, false>;
  }
  return launch_kernel(kernel, plan.grid, plan.threads, plan.shared, plan.cluster, stream, k);
}

template <class T>
cudaError_t launch_loss(const DlbCudaArgs& given) {
  // fp64 is for proofs, not for speed: one form of it does.
  if (sizeof(T) == 8 || given.loss.label_smoothing != 0) return launch_rows<T, true>(given);
  if constexpr (sizeof(T) < 8) return launch_rows<T, false>(given);
}

// A gradient stored over the logits, one row a block.
template <class T>
__global__ void __launch_bounds__(kThreads) rescale_kernel(const __grid_constant__ KernelArgs k) {
  using R = Real<T>;
  const DlbArgs& a = k.given.loss;
  bool done;
  const R scale = gradient_scale<R>(k.given, done);
  if (done) return;
  const R factor = scale / value_or<R>(a.grad_scale, k.given.grad_scale);
  T* row = static_cast<T*>(a.dlogits) + int64_t(blockIdx.x) * a.dlogits_stride;
  for (int c = threadIdx.x; c < int(a.C); c += kThreads) {
    store_element(row + c, element_of<T>(real_of(load_element(row + c)) * factor));
  }
}

template <class T>
cudaError_t launch_rescale(const DlbCudaArgs& given) {
  const KernelArgs k = {given, false, 0, 0, 0, false, false, false};
  const auto stream = reinterpret_cast<cudaStream_t>(given.stream);
  return launch_kernel(rescale_kernel<T>, unsigned(given.loss.B), kThreads, 0, 1, stream, k);
}
