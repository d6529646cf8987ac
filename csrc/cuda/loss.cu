// The functions that Python calls: by type, on the right device.
#include "elements.h"
#include "loss.h"

#ifdef __CUDACC__
#include <dlfcn.h>
#endif

template <class T>
cudaError_t launch_loss(const DlbCudaArgs&);
template <class T>
cudaError_t launch_rescale(const DlbCudaArgs&);

namespace {

using Launch = cudaError_t (*)(const DlbCudaArgs&);

int launch_on_device(const DlbCudaArgs& args, Launch launch) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess && before != args.device) error = cudaSetDevice(args.device);
  if (error != cudaSuccess) return error;
  error = launch(args);
  if (before != args.device) cudaSetDevice(before);
  return error;
}

}  // namespace

int dlb_cuda_loss(const DlbCudaArgs* args) {
  constexpr Launch kLaunch[] = {launch_loss<float>, launch_loss<double>, launch_loss<BFloat16>,
                                launch_loss<Float16>};
  return launch_on_device(*args, kLaunch[args->loss.dtype]);
}

int dlb_cuda_rescale(const DlbCudaArgs* args) {
  constexpr Launch kLaunch[] = {launch_rescale<float>, launch_rescale<double>,
                                launch_rescale<BFloat16>, launch_rescale<Float16>};
  return launch_on_device(*args, kLaunch[args->loss.dtype]);
}

int dlb_cuda_runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

// From the driver itself: cudaDriverGetVersion begins with cuInit, and then no child that is forked
// can use a GPU.
int dlb_cuda_driver_version() {
  int version = 0;
#ifdef __CUDACC__
  void* const driver = dlopen("libcuda.so.1", RTLD_LAZY);
  if (driver == nullptr) return 0;
  const auto get = reinterpret_cast<int (*)(int*)>(dlsym(driver, "cuDriverGetVersion"));
  return get != nullptr && get(&version) == 0 ? version : 0;
#else
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
#endif
}

int dlb_cuda_capability(int device) {
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  }
  return error == cudaSuccess ? 10 * major + minor : -int(error);
}

const char* dlb_cuda_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
