package podspec

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/probelet/probelet/daemon/internal/table"
)

// Mismatch rewords a decoder's error about a value of another type, so that it names the field, the value in the text, and what that must
// be, in the words of JSON and YAML. Other errors stay as they are.
func Mismatch(text []byte, err error) error {
	var mismatch *json.UnmarshalTypeError
	if !errors.As(err, &mismatch) {
		return err
	}
	field := strings.ReplaceAll(mismatch.Field, "ProbeHandler.", "") // embedded, so the text does not have it
	value := strings.TrimPrefix(mismatch.Value, "number ")
	// Types that decode themselves count offsets from where their value begins.
	if path, found, ok := valueAt(decoder(text), mismatch.Offset, ""); ok && strings.HasPrefix(indexes.ReplaceAllString(path, ""), field) {
		field = path
		if found != "" {
			value = found
		}
	}
	if field != "" {
		field += ": "
	}
	return fmt.Errorf("%s%s: must be %s", table.Printable(field), value, expected(mismatch, value))
}

var indexes = regexp.MustCompile(`\[\d+\]`)

func decoder(text []byte) *json.Decoder {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	return d
}

// valueAt returns the path and text of the value that ends at an offset. Of an object or list it is the beginning that counts, and the text
// is empty.
func valueAt(d *json.Decoder, offset int64, path string) (at, value string, ok bool) {
	token, err := d.Token()
	if err != nil || d.InputOffset() >= offset {
		return path, short(token), err == nil
	}
	if _, nested := token.(json.Delim); !nested {
		return "", "", false
	}
	for i := 0; d.More(); i++ {
		below := fmt.Sprintf("%s[%d]", path, i)
		if token == json.Delim('{') {
			key, _ := d.Token() // the text has been decoded once
			below = strings.TrimPrefix(fmt.Sprintf("%s.%s", path, key), ".")
		}
		if at, value, ok = valueAt(d, offset, below); ok {
			return at, value, ok
		}
	}
	_, _ = d.Token() // the end
	return "", "", false
}

func short(token json.Token) string {
	const most = 40
	switch v := token.(type) {
	case json.Delim:
		return ""
	case string:
		if utf8.RuneCountInString(v) > most {
			v = string([]rune(v)[:most]) + "…"
		}
		return strconv.Quote(v)
	}
	return fmt.Sprint(token)
}

// expected says what a value must be.
func expected(mismatch *json.UnmarshalTypeError, value string) string {
	switch kind := mismatch.Type.Kind(); kind {
	case reflect.String:
		if mismatch.Value == "bool" || strings.HasPrefix(mismatch.Value, "number") {
			return "a string; put it in quotes"
		}
		return "a string"
	case reflect.Bool:
		return "true or false"
	case reflect.Slice, reflect.Array:
		return "a list"
	case reflect.Map, reflect.Struct, reflect.Pointer:
		return "an object"
	case reflect.Int, reflect.Int32, reflect.Int64:
		most := int64(1)<<(mismatch.Type.Bits()-1) - 1
		switch digits := strings.TrimPrefix(value, "-"); {
		case digits == "" || strings.Trim(digits, "0123456789") != "":
			return "a whole number"
		case digits != value:
			return fmt.Sprintf("at least %d", -most-1)
		}
		return fmt.Sprintf("at most %d", most)
	default:
		return "of type " + mismatch.Type.String()
	}
}
