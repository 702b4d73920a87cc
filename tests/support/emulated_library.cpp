// Runs csrc's CPU operators without PyTorch, for example in an emulator of another processor. This
// program is linked with all of csrc. It implements the functions of PyTorch's stable ABI that csrc
// calls. emulated_library.py sends the arguments of each call on stdin and reads the results from
// stdout. Both sides have the byte order and the number formats of the host.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>

using Storage = std::shared_ptr<std::string>;
using torch::headeronly::ScalarType;

struct AtenTensorOpaque {
  Storage storage;
  int64_t offset;  // of the first element, in bytes
  int32_t dtype;
  std::vector<int64_t> sizes, strides;

  char* data() const { return storage->data() + offset; }
  int64_t numel() const {
    int64_t product = 1;
    for (const int64_t size : sizes) product *= size;
    return product;
  }
  std::vector<int64_t> contiguous_strides() const {
    std::vector<int64_t> result(sizes.size());
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) {
      result[i] = stride;
    }
    return result;
  }
  bool is_contiguous() const {
    const auto expected = contiguous_strides();
    for (size_t i = 0; i < sizes.size(); ++i) {
      if (sizes[i] != 1 && strides[i] != expected[i] && numel() > 0) return false;
    }
    return true;
  }
};
struct StableListOpaque : std::vector<StableIValue> {};
struct StringOpaque : std::string {};

namespace {

int64_t threads = 1;
bool needs_python = false;  // a kernel has called an operator that this program does not have

struct Kernel {
  void (*run)(StableIValue* stack, uint64_t arguments, uint64_t results);
  uint64_t arguments, results;  // their numbers
};

// What csrc has registered. csrc's static objects register before those of this file exist.
struct Library {
  std::string schemas;
  std::map<std::string, Kernel> kernels;  // by the name of the operator
};
Library& library() {
  static Library registered;
  return registered;
}

template <typename T>
StableIValue value_of(T x) {
  StableIValue value = 0;
  std::memcpy(&value, &x, sizeof x);
  return value;
}

// The elements of tensors have at most 8 bytes; kernels see only the dtypes below.
int64_t size_of(int32_t dtype) {
  switch (static_cast<ScalarType>(dtype)) {
    case ScalarType::Double: case ScalarType::Long: return 8;
    case ScalarType::Float: case ScalarType::Int: return 4;
    case ScalarType::Half: case ScalarType::BFloat16: case ScalarType::Short: return 2;
    default: return 1;
  }
}

void copy(const AtenTensorOpaque& from, size_t dim, const char* source, char*& to) {
  if (dim == from.sizes.size()) {
    std::memcpy(to, source, size_of(from.dtype));
    to += size_of(from.dtype);
    return;
  }
  for (int64_t i = 0; i < from.sizes[dim]; ++i) {
    copy(from, dim + 1, source + i * from.strides[dim] * size_of(from.dtype), to);
  }
}

void read(void* to, size_t size) {
  if (size && std::fread(to, size, 1, stdin) != 1) std::exit(0);  // the host has ended
}
int64_t read_number() {
  int64_t number;
  read(&number, sizeof number);
  return number;
}
std::string read_bytes() {
  std::string bytes(read_number(), '\0');
  read(bytes.data(), bytes.size());
  return bytes;
}
std::vector<int64_t> read_numbers() {
  std::vector<int64_t> numbers(read_number());
  read(numbers.data(), numbers.size() * sizeof(int64_t));
  return numbers;
}
void write_number(int64_t number) { std::fwrite(&number, sizeof number, 1, stdout); }
void write_bytes(const std::string& bytes) {
  write_number(bytes.size());
  std::fwrite(bytes.data(), 1, bytes.size(), stdout);
}
void write_numbers(const std::vector<int64_t>& numbers) {
  write_number(numbers.size());
  for (const int64_t number : numbers) write_number(number);
}

StableIValue read_value(const std::vector<Storage>& storages) {
  switch (read_number()) {
    case 'n': return 0;  // None
    case 'b': return read_number();  // the bits of a number
    case 'o': return value_of(new StableIValue(read_value(storages)));  // an optional value
    case 's': return value_of(new StringOpaque{read_bytes()});
    case 't': {
      const int64_t storage = read_number(), offset = read_number(), dtype = read_number();
      const auto sizes = read_numbers(), strides = read_numbers();
      return value_of(new AtenTensorOpaque{storages.at(storage), offset,
                                           static_cast<int32_t>(dtype), sizes, strides});
    }
    default: {
      auto* const list = new StableListOpaque;
      for (int64_t left = read_number(); left > 0; --left) list->push_back(read_value(storages));
      return value_of(list);
    }
  }
}

template <typename T>
std::unique_ptr<T> owned(StableIValue value) {
  T* pointer;
  std::memcpy(&pointer, &value, sizeof pointer);
  return std::unique_ptr<T>(pointer);
}

void write_result(char type, StableIValue value) {
  if (type == 't') {
    const auto tensor = owned<AtenTensorOpaque>(value);
    write_number(tensor->dtype);
    write_numbers(tensor->sizes);
    write_numbers(tensor->strides);
    write_bytes(*tensor->storage);
  } else if (type == 's') {
    write_bytes(*owned<StringOpaque>(value));
  } else {
    write_number(value);
  }
}

// Runs one call. The answer is 'r', the storages of the arguments and the results; 'p' if Python
// computes the results instead; or 'e' and an error message.
void answer() {
  const Kernel& kernel = library().kernels.at(read_bytes());
  threads = read_number();
  std::vector<Storage> storages(read_number());
  for (Storage& storage : storages) storage = std::make_shared<std::string>(read_bytes());
  std::vector<StableIValue> stack(std::max(kernel.arguments, kernel.results));
  for (size_t i = 0; i < kernel.arguments; ++i) stack[i] = read_value(storages);
  const std::string results = read_bytes();  // their types
  needs_python = false;
  try {
    kernel.run(stack.data(), kernel.arguments, kernel.results);
  } catch (const std::exception& error) {
    write_number(needs_python ? 'p' : 'e');
    if (!needs_python) write_bytes(error.what());
    return;
  }
  write_number('r');
  for (const Storage& storage : storages) write_bytes(*storage);
  for (size_t i = 0; i < results.size(); ++i) write_result(results[i], stack[i]);
}

}  // namespace

#define CONSTANT(name, value) \
  int32_t aoti_torch_##name() { return static_cast<int32_t>(value); }
#define DTYPE(name, value) CONSTANT(dtype_##name, ScalarType::value)
#define DEVICE(name, value) CONSTANT(device_type_##name, torch::headeronly::DeviceType::value)
#define UNUSED(name) CONSTANT(name, -1)

extern "C" {
// clang-format off
DTYPE(uint8, Byte) DTYPE(int8, Char) DTYPE(int16, Short) DTYPE(int32, Int) DTYPE(int64, Long)
DTYPE(float16, Half) DTYPE(float32, Float) DTYPE(float64, Double) DTYPE(bfloat16, BFloat16)
DTYPE(complex32, ComplexHalf) DTYPE(complex64, ComplexFloat) DTYPE(complex128, ComplexDouble)
DTYPE(bool, Bool) DTYPE(uint16, UInt16) DTYPE(uint32, UInt32) DTYPE(uint64, UInt64)
DTYPE(float8_e5m2, Float8_e5m2) DTYPE(float8_e4m3fn, Float8_e4m3fn)
DTYPE(float8_e5m2fnuz, Float8_e5m2fnuz) DTYPE(float8_e4m3fnuz, Float8_e4m3fnuz)
DEVICE(cpu, CPU) DEVICE(cuda, CUDA) DEVICE(meta, Meta) DEVICE(xpu, XPU) DEVICE(mps, MPS)
DEVICE(privateuse1, PrivateUse1)
UNUSED(layout_strided) UNUSED(layout_sparse_coo) UNUSED(layout_sparse_csr)
UNUSED(layout_sparse_csc) UNUSED(layout_sparse_bsr) UNUSED(layout_sparse_bsc)
UNUSED(layout__mkldnn) UNUSED(layout_jagged)
UNUSED(memory_format_contiguous_format) UNUSED(memory_format_channels_last)
UNUSED(memory_format_channels_last_3d) UNUSED(memory_format_preserve_format)
// clang-format on

uint64_t aoti_torch_abi_version() { return 0; }

#define FUNCTION(name, result, ...)                \
  AOTITorchError name(__VA_ARGS__) {               \
    result;                                        \
    return AOTI_TORCH_SUCCESS;                     \
  }
using TensorHandle = AtenTensorHandle;

FUNCTION(aoti_torch_get_data_ptr, *data = x->data(), TensorHandle x, void** data)
FUNCTION(aoti_torch_get_dim, *dim = x->sizes.size(), TensorHandle x, int64_t* dim)
FUNCTION(aoti_torch_get_dtype, *dtype = x->dtype, TensorHandle x, int32_t* dtype)
FUNCTION(aoti_torch_get_numel, *numel = x->numel(), TensorHandle x, int64_t* numel)
FUNCTION(aoti_torch_get_size, *size = x->sizes[i], TensorHandle x, int64_t i, int64_t* size)
FUNCTION(aoti_torch_get_stride, *stride = x->strides[i], TensorHandle x, int64_t i, int64_t* stride)
FUNCTION(aoti_torch_get_sizes, *sizes = x->sizes.data(), TensorHandle x, int64_t** sizes)
FUNCTION(aoti_torch_get_strides, *strides = x->strides.data(), TensorHandle x, int64_t** strides)
FUNCTION(aoti_torch_get_device_type, *type = 0, TensorHandle, int32_t* type)
FUNCTION(aoti_torch_get_device_index, *index = 0, TensorHandle, int32_t* index)
FUNCTION(aoti_torch_is_contiguous, *is = x->is_contiguous(), TensorHandle x, bool* is)
FUNCTION(aoti_torch_new_tensor_handle, *to = new AtenTensorOpaque(*x), TensorHandle x,
         TensorHandle* to)
FUNCTION(aoti_torch_new_uninitialized_tensor, *to = new AtenTensorOpaque, TensorHandle* to)
FUNCTION(aoti_torch_delete_tensor_object, delete x, TensorHandle x)

AOTITorchError aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides,
                                        int32_t dtype, int32_t, int32_t, TensorHandle* to) {
  int64_t last = 0;
  bool is_empty = false;
  for (int64_t i = 0; i < dim; ++i) {
    last += (sizes[i] - 1) * strides[i];
    is_empty |= sizes[i] == 0;
  }
  // NaN in float16, and a very large number in other dtypes, reveals elements that are not written.
  const auto storage =
      std::make_shared<std::string>(is_empty ? 0 : (last + 1) * size_of(dtype), '\x7f');
  *to = new AtenTensorOpaque{storage, 0, dtype, {sizes, sizes + dim}, {strides, strides + dim}};
  return AOTI_TORCH_SUCCESS;
}

FUNCTION(torch_new_string_handle, (*to = new StringOpaque)->assign(data, size), const char* data,
         size_t size, StringHandle* to)
FUNCTION(torch_string_length, *size = x->size(), StringHandle x, size_t* size)
FUNCTION(torch_string_c_str, *data = x->c_str(), StringHandle x, const char** data)
FUNCTION(torch_delete_string, delete x, StringHandle x)
FUNCTION(torch_list_size, *size = x->size(), StableListHandle x, size_t* size)
// The receiver owns the element; each element is read once.
FUNCTION(torch_list_get_item, *value = (*x)[i], StableListHandle x, size_t i, StableIValue* value)
FUNCTION(torch_delete_list, delete x, StableListHandle x)

FUNCTION(aoti_torch_library_init_impl, *to = nullptr, const char*, const char*, const char*,
         uint32_t, TorchLibraryHandle* to)
FUNCTION(aoti_torch_library_init_def, *to = nullptr, const char*, const char*, uint32_t,
         TorchLibraryHandle* to)
FUNCTION(aoti_torch_library_init_fragment, *to = nullptr, const char*, const char*, uint32_t,
         TorchLibraryHandle* to)
FUNCTION(aoti_torch_library_def, (library().schemas += schema) += '\n', TorchLibraryHandle,
         const char* schema)
FUNCTION(torch_library_impl, library().kernels[name].run = run, TorchLibraryHandle, const char* name,
         void (*run)(StableIValue*, uint64_t, uint64_t), uint64_t)
FUNCTION(aoti_torch_delete_library_object, , TorchLibraryHandle)

// Runs the ranges that PyTorch's threads would get, one after the other.
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc function,
                                  void* context) {
  const int64_t count = end - begin;
  if (count <= 0) return AOTI_TORCH_SUCCESS;
  int64_t ranges = std::min(threads, (count + grain - 1) / grain);
  const int64_t size = (count + ranges - 1) / ranges;
  for (; begin < end; begin += size) function(begin, std::min(begin + size, end), context);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_call_dispatcher(const char* name, const char*, StableIValue* stack, uint64_t) {
  if (std::strcmp(name, "aten::contiguous") == 0) {
    const auto from = owned<AtenTensorOpaque>(stack[0]);
    AtenTensorHandle to;
    aoti_torch_empty_strided(from->sizes.size(), from->sizes.data(),
                             from->contiguous_strides().data(), from->dtype, 0, 0, &to);
    char* position = to->data();
    copy(*from, 0, from->data(), position);
    stack[0] = value_of(to);
    return AOTI_TORCH_SUCCESS;
  }
  const auto& kernels = library().kernels;
  const char* const colons = std::strstr(name, "::");
  if (const auto found = kernels.find(colons + 2); found != kernels.end()) {
    found->second.run(stack, found->second.arguments, found->second.results);
    return AOTI_TORCH_SUCCESS;
  }
  needs_python = true;
  return AOTI_TORCH_FAILURE;
}
}

int main() {
  write_bytes(library().schemas);
  std::string names;
  for (const auto& [name, kernel] : library().kernels) names += name + '\n';
  write_bytes(names);
  std::fflush(stdout);
  for (auto& [name, kernel] : library().kernels) {
    kernel.arguments = read_number();
    kernel.results = read_number();
  }
  for (;;) {
    std::fflush(stdout);
    answer();
  }
}
