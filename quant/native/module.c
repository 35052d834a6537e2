/* quant._native: the kernels as a Python module (limited API of 3.10).
 *
 * The buffer protocol is not part of that API, so addresses come as integers: quant/backend.py has made sure of types, shapes, sizes
 * and lifetimes. Nothing here must be called with anything else. */
#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

#include "kernels.h"

static PyObject *failure(int status) {
    switch (status) {
    case QUANT_BAD_LEVEL: PyErr_SetString(PyExc_ValueError, "this CPU or build does not have that level"); break;
    case QUANT_BAD_FORMAT: PyErr_SetString(PyExc_ValueError, "unknown format number"); break;
    case QUANT_BAD_TYPE: PyErr_SetString(PyExc_ValueError, "source type must be F32 (0), F16 (1) or BF16 (30)"); break;
    default: PyErr_SetString(PyExc_ValueError, "columns must be a multiple of the block length, rows and columns not negative");
    }
    return NULL;
}

PyDoc_STRVAR(encode_doc, "encode(level, format, source, source_type, rows, columns, row_stride, importance, destination)\n--\n\n"
                         "Encode rows x columns weights at address `source` (rows `row_stride` bytes apart, a row's weights contiguous)\n"
                         "to blocks at `destination`. source_type: 0 float32, 1 float16, 30 bfloat16. importance: address of `columns`\n"
                         "float32, or 0. Addresses are integers and are trusted. Releases the GIL.");
static PyObject *encode(PyObject *self, PyObject *args) {
    int level, format, type, status;
    unsigned long long source, importance, destination;
    long long rows, columns, stride;
    (void)self;
    if (!PyArg_ParseTuple(args, "iiKiLLLKK:encode", &level, &format, &source, &type, &rows, &columns, &stride, &importance,
                          &destination))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = quant_encode(level, format, (const void *)(uintptr_t)source, type, rows, columns, stride,
                          (const float *)(uintptr_t)importance, (uint8_t *)(uintptr_t)destination);
    Py_END_ALLOW_THREADS
    if (status != QUANT_OK)
        return failure(status);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(decode_doc, "decode(level, format, source, rows, columns, row_stride, destination)\n--\n\n"
                         "Decode rows of blocks at address `source`, `row_stride` bytes apart, to rows x columns contiguous float32 at\n"
                         "`destination`. Addresses are integers and are trusted. Releases the GIL.");
static PyObject *decode(PyObject *self, PyObject *args) {
    int level, format, status;
    unsigned long long source, destination;
    long long rows, columns, stride;
    (void)self;
    if (!PyArg_ParseTuple(args, "iiKLLLK:decode", &level, &format, &source, &rows, &columns, &stride, &destination))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = quant_decode(level, format, (const uint8_t *)(uintptr_t)source, rows, columns, stride,
                          (float *)(uintptr_t)destination);
    Py_END_ALLOW_THREADS
    if (status != QUANT_OK)
        return failure(status);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(first_nonfinite_doc, "first_nonfinite(level, source, source_type, rows, columns, row_stride)\n--\n\n"
                                  "Number of the first infinity or NaN, or -1. Arguments as of encode. Releases the GIL.");
static PyObject *first_nonfinite(PyObject *self, PyObject *args) {
    int level, type;
    unsigned long long source;
    long long rows, columns, stride, found;
    (void)self;
    if (!PyArg_ParseTuple(args, "iKiLLL:first_nonfinite", &level, &source, &type, &rows, &columns, &stride))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    found = quant_first_nonfinite(level, (const void *)(uintptr_t)source, type, rows, columns, stride);
    Py_END_ALLOW_THREADS
    if (found < -1)
        return failure((int)found + 1);
    return PyLong_FromLongLong(found);
}

PyDoc_STRVAR(levels_doc, "levels()\n--\n\nThe CPU levels this machine runs, the number of each its index, the best one last.");
static PyObject *levels(PyObject *self, PyObject *unused) {
    const int count = quant_best_level() + 1;
    PyObject *names = PyTuple_New(count);
    (void)self;
    (void)unused;
    for (int i = 0; names && i < count; i++) {
        PyObject *name = PyUnicode_FromString(quant_level_name(i));
        if (!name || PyTuple_SetItem(names, i, name) < 0)
            Py_CLEAR(names);
    }
    return names;
}

static PyMethodDef methods[] = {
    {"encode", encode, METH_VARARGS, encode_doc},
    {"decode", decode, METH_VARARGS, decode_doc},
    {"first_nonfinite", first_nonfinite, METH_VARARGS, first_nonfinite_doc},
    {"levels", levels, METH_NOARGS, levels_doc},
    {NULL, NULL, 0, NULL},
};
static PyModuleDef_Slot slots[] = {{0, NULL}};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "quant._native", "Block encoders and decoders in C, with ggml's bytes.", 0, methods, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
