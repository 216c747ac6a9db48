package podspec

import (
	"encoding/json"
	"reflect"
	"strings"
)

// Expected says what a field must be whose value has another type, in the words of JSON and YAML.
func Expected(mismatch *json.UnmarshalTypeError) string {
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
		return "a whole number"
	default:
		return "of type " + mismatch.Type.String()
	}
}
